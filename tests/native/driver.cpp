// Runs the core on random problems and compares it with plain loops in double precision.
//   foveate_driver [cases] [first seed] [largest number of rows]
// Every buffer is its own allocation of the exact size, outputs and the gaps between rows hold NaN: a sanitizer sees
// an access outside a buffer, the comparison sees a value that was never written or should never have been read.
// Each problem runs at every level that this machine has, with one thread and with three, which must agree bit for bit.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "foveate_cpu.h"
#include "tools.h"

namespace {

float half_to_float(uint16_t bits) {
    int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
    double value = exponent == 31  ? (mantissa ? std::nan("") : INF)
                   : exponent == 0 ? std::ldexp(mantissa, -24)
                                   : std::ldexp(mantissa + 1024, exponent - 25);
    return (float)(bits & 0x8000 ? -value : value);
}

uint16_t float_to_half(float x) {  // for the moderate numbers made here
    double magnitude = std::fabs(x);
    if (std::isnan(x)) return 0x7e00;
    int exponent;
    std::frexp(magnitude, &exponent);
    if (magnitude == 0 || exponent < -13) return (uint16_t)((x < 0 ? 0x8000 : 0) | (int)std::nearbyint(magnitude * 16777216));
    int bits = (int)std::nearbyint(std::ldexp(magnitude, 11 - exponent));  // 1024..2048
    return (uint16_t)((x < 0 ? 0x8000 : 0) + ((exponent + 14) << 10) + bits - 1024);
}

float bfloat_to_float(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}

uint16_t float_to_bfloat(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (std::isnan(x)) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// (B, H, N, D) of one of the three types, with gaps of NaN between rows.
struct Tensor {
    int dtype;
    int64_t heads, rows, width, stride;
    Array<unsigned char> bytes;
    Tensor(int dtype, int64_t batch, int64_t heads, int64_t rows, int64_t width)
        : dtype(dtype), heads(heads), rows(rows), width(width), stride(width + integer(0, 2) * 3) {
        bytes = Array<unsigned char>(item() * (batch * heads * rows == 0 ? 0 : (batch * heads * rows - 1) * stride + width));
        for (int64_t i = 0; i < bytes.size / item(); ++i) write(i, NOT_A_NUMBER);
    }
    int64_t item() const { return dtype == FV_F32 ? 4 : 2; }
    int64_t at(int64_t b, int64_t h, int64_t n, int64_t j) const { return ((b * heads + h) * rows + n) * stride + j; }
    void write(int64_t i, float x) {
        if (dtype == FV_F32) return (void)std::memcpy(&bytes[i * 4], &x, 4);
        uint16_t bits = dtype == FV_BF16 ? float_to_bfloat(x) : float_to_half(x);
        std::memcpy(&bytes[i * 2], &bits, 2);
    }
    float read(int64_t i) const {
        float x;
        uint16_t bits;
        if (dtype == FV_F32) return std::memcpy(&x, &bytes[i * 4], 4), x;
        std::memcpy(&bits, &bytes[i * 2], 2);
        return dtype == FV_BF16 ? bfloat_to_float(bits) : half_to_float(bits);
    }
    float get(int64_t b, int64_t h, int64_t n, int64_t j) const { return read(at(b, h, n, j)); }
    void random(int64_t batch) {
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t h = 0; h < heads; ++h)
                for (int64_t n = 0; n < rows; ++n)
                    for (int64_t j = 0; j < width; ++j) write(at(b, h, n, j), (float)normal());
    }
    fv_tensor view() { return {bytes.data.get(), heads * rows * stride, rows * stride, stride}; }
};

using Allowed = std::vector<std::vector<char>>;  // [query][key]

Allowed random_pattern(int64_t n_q, int64_t n_k) {
    Allowed allowed(n_q, std::vector<char>(n_k, 0));
    int kind = (int)integer(0, 3);
    int64_t window = integer(1, 40);
    double density = std::uniform_real_distribution<double>(0, 1)(engine);
    for (int64_t i = 0; i < n_q; ++i)
        for (int64_t j = 0; j < n_k; ++j)
            allowed[i][j] = kind == 0   ? 1
                            : kind == 1 ? std::llabs(i - j) <= window
                            : kind == 2 ? j <= i && i / window == j / window
                                        : chance(density * density);
    return allowed;
}

// A flattened Schedule of `sets` patterns: own rows in random groups, the others in runs, masks where needed.
struct Cells {
    std::vector<int64_t> set_ptr{0}, own_ptr{0}, run_ptr{0}, mask_ptr;
    std::vector<int32_t> own, runs;
    std::vector<uint8_t> masks;
    Array<int64_t> a_set, a_own_ptr, a_run_ptr, a_mask_ptr;
    Array<int32_t> a_own, a_runs;
    Array<uint8_t> a_masks;

    void add(const Allowed& allowed, int64_t n_own, int64_t n_other, bool transposed) {
        std::vector<int32_t> order(n_own);
        for (int64_t i = 0; i < n_own; ++i) order[i] = (int32_t)i;
        if (chance(0.5)) std::shuffle(order.begin(), order.end(), engine);
        int64_t largest = integer(1, 64);
        for (int64_t i = 0; i < n_own || chance(0.2);) {
            int64_t n = chance(0.05) ? 0 : std::min(n_own - i, integer(1, largest));  // now and then a cell of nobody
            auto pair = [&](int64_t own_at, int64_t other) {
                return transposed ? allowed[other][order[own_at]] : allowed[order[own_at]][other];
            };
            bool every = true;
            std::vector<int32_t> others;
            for (int64_t j = 0; j < n_other; ++j) {
                bool any = chance(0.02), all = true;  // now and then a row that nobody needs
                for (int64_t l = i; l < i + n; ++l) any |= pair(l, j), all &= (bool)pair(l, j);
                if (any) others.push_back((int32_t)j), every &= all;
            }
            for (size_t j = 0; j < others.size();) {
                size_t end = j + 1;
                while (end < others.size() && others[end] == others[end - 1] + 1 && !chance(0.01)) ++end;
                runs.push_back(others[j]), runs.push_back((int32_t)(end - j)), j = end;
            }
            mask_ptr.push_back(every ? -1 : (int64_t)masks.size());
            if (!every)
                for (int32_t j : others) {
                    uint64_t bits = 0;
                    for (int64_t l = 0; l < n; ++l) bits |= (uint64_t)(pair(i + l, j) != 0) << l;
                    for (int byte = 0; byte < 8; ++byte) masks.push_back((uint8_t)(bits >> (8 * byte)));
                }
            own.insert(own.end(), order.begin() + i, order.begin() + i + n);
            own_ptr.push_back((int64_t)own.size()), run_ptr.push_back((int64_t)runs.size() / 2);
            i += n;
        }
        set_ptr.push_back((int64_t)mask_ptr.size());
    }
    fv_cells view(int64_t stride_b, int64_t stride_h) {
        a_set = Array<int64_t>(set_ptr), a_own_ptr = Array<int64_t>(own_ptr), a_run_ptr = Array<int64_t>(run_ptr);
        a_mask_ptr = Array<int64_t>(mask_ptr), a_own = Array<int32_t>(own), a_runs = Array<int32_t>(runs);
        a_masks = Array<uint8_t>(masks);
        fv_cells c{};
        c.set_ptr = a_set.data.get(), c.set_stride_b = stride_b, c.set_stride_h = stride_h;
        c.own_ptr = a_own_ptr.data.get(), c.own = a_own.data.get(), c.run_ptr = a_run_ptr.data.get();
        c.runs = a_runs.data.get(), c.mask_ptr = a_mask_ptr.data.get(), c.masks = a_masks.data.get();
        return c;
    }
};

struct Term {
    Array<float> table;
    Array<int32_t> q_code, k_code;
    int64_t size, stride_h, base;
};

struct Results {
    Tensor out, d_q, d_k, d_v;
    Array<float> lse, d_factor;
    std::vector<Array<float>> d_terms;
};

bool same(const Array<unsigned char>& a, const Array<unsigned char>& b) {
    return std::memcmp(a.data.get(), b.data.get(), a.size) == 0;
}

void run_case(uint64_t seed, int64_t largest) {
    engine.seed(seed);
    const int64_t widths[] = {8, 16, 24, 32, 40, 64, 72, 96, 128, 136, 200, 256};
    const int64_t B = integer(1, 2), KV = integer(1, 2), G = integer(1, 3), H = KV * G;
    const int64_t n_q = integer(1, largest), n_k = integer(1, largest);
    const int64_t D = widths[integer(0, 11)], DV = chance(0.5) ? D : widths[integer(0, 11)];
    const int dtype = (int)integer(0, 2), rule = chance(0.25) ? FV_SIGMOID : FV_SOFTMAX;
    const bool routed = chance(0.4), factor = chance(0.4), sink = rule == FV_SOFTMAX && chance(0.4);
    const double tolerance = dtype == FV_F32 ? 2e-4 : dtype == FV_F16 ? 6e-3 : 4e-2;
    Tensor q(dtype, B, H, n_q, D), k(dtype, B, KV, n_k, D), v(dtype, B, KV, n_k, DV), d_out(dtype, B, H, n_q, DV);
    q.random(B), k.random(B), v.random(B), d_out.random(B);

    // One pattern for all, or one per (batch, key head).
    std::vector<Allowed> patterns;
    Cells by_query, by_key;
    for (int64_t set = 0; set < (routed ? B * KV : 1); ++set) {
        patterns.push_back(random_pattern(n_q, n_k));
        by_key.add(patterns.back(), n_k, n_q, true);
        for (int64_t g = 0; g < (routed ? G : 1); ++g) by_query.add(patterns.back(), n_q, n_k, false);
    }

    fv_job job;
    std::memset(&job, 0, sizeof job);
    job.abi = FV_ABI, job.dtype = dtype, job.rule = rule;
    job.batch = B, job.heads = H, job.kv_heads = KV, job.n_q = n_q, job.n_k = n_k, job.dim = D, job.dim_v = DV;
    job.scale = 1 / std::sqrt((float)D);
    job.softcap = chance(0.3) ? 3.0f : 0.0f;
    job.sigmoid_bias = rule == FV_SIGMOID ? -1.5f : 0.0f;
    job.q = q.view(), job.k = k.view(), job.v = v.view(), job.d_out = d_out.view();
    job.by_query = by_query.view(routed ? H : 0, routed ? 1 : 0);
    job.by_key = by_key.view(routed ? KV : 0, routed ? 1 : 0);
    job.slices = integer(1, 9);
    Array<float> factors(H * n_q), sinks(H);
    for (int64_t i = 0; i < factors.size; ++i) factors[i] = (float)(1 + 0.3 * normal());
    for (int64_t i = 0; i < H; ++i) sinks[i] = (float)normal();
    if (factor) job.row_factor = factors.data.get(), job.row_factor_stride_h = n_q;
    if (sink) job.sink = sinks.data.get();
    std::vector<Term> terms(integer(0, 2));
    for (auto& term : terms) {
        bool heads = chance(0.5);
        term.size = integer(1, n_q + n_k), term.stride_h = heads ? term.size : 0, term.base = integer(-3, 3);
        term.table = Array<float>(heads ? H * term.size : term.size);
        for (int64_t i = 0; i < term.table.size; ++i) term.table[i] = (float)(0.5 * normal());
        term.q_code = Array<int32_t>(n_q), term.k_code = Array<int32_t>(n_k);
        for (int64_t i = 0; i < n_q; ++i) term.q_code[i] = (int32_t)(n_q - i);
        for (int64_t i = 0; i < n_k; ++i) term.k_code[i] = (int32_t)i;
    }
    job.n_terms = (int32_t)terms.size();

    // Plain loops.
    std::vector<double> out(B * H * n_q * DV), lse(B * H * n_q), delta(B * H * n_q), d_factor(B * H * n_q);
    std::vector<double> d_q(B * H * n_q * D), d_k(B * KV * n_k * D), d_v(B * KV * n_k * DV);
    std::vector<std::vector<double>> d_terms;
    for (auto& term : terms) d_terms.emplace_back(H * term.size, 0.0);
    for (int64_t b = 0; b < B; ++b)
        for (int64_t h = 0; h < H; ++h)
            for (int64_t i = 0; i < n_q; ++i) {
                const int64_t kv = h / G, row = (b * H + h) * n_q + i;
                const Allowed& allowed = patterns[routed ? b * KV + kv : 0];
                const double rows_factor = factor ? factors[h * n_q + i] : 1;
                std::vector<double> weight(n_k, 0.0), slope(n_k, 1.0), dots(n_k, 0.0);
                double top = sink ? sinks[h] : -INF, sum = 0;
                for (int64_t j = 0; j < n_k; ++j) {
                    if (!allowed[i][j]) continue;
                    for (int64_t c = 0; c < D; ++c) dots[j] += (double)q.get(b, h, i, c) * k.get(b, kv, j, c);
                    double s = dots[j] * job.scale * rows_factor;
                    for (auto& term : terms) {
                        int64_t at = term.q_code[i] + term.k_code[j] + term.base;
                        s += term.table[h * term.stride_h + std::min(std::max<int64_t>(at, 0), term.size - 1)];
                    }
                    if (job.softcap > 0) {
                        double t = std::tanh(s / job.softcap);
                        slope[j] = 1 - t * t, s = job.softcap * t;
                    }
                    weight[j] = s, top = std::max(top, s);
                }
                if (sink) sum = std::exp(sinks[h] - top);
                for (int64_t j = 0; j < n_k; ++j)
                    if (allowed[i][j]) sum += std::exp(weight[j] - top);
                lse[row] = sum > 0 ? top + std::log(sum) : -INF;
                for (int64_t j = 0; j < n_k; ++j) {
                    if (!allowed[i][j]) continue;
                    weight[j] = rule == FV_SIGMOID ? 1 / (1 + std::exp(-weight[j] - job.sigmoid_bias))
                                                   : std::exp(weight[j] - lse[row]);
                    for (int64_t c = 0; c < DV; ++c) out[row * DV + c] += weight[j] * v.get(b, kv, j, c);
                }
                for (int64_t c = 0; c < DV; ++c) delta[row] += out[row * DV + c] * d_out.get(b, h, i, c);
                for (int64_t j = 0; j < n_k; ++j) {
                    if (!allowed[i][j]) continue;
                    double dp = 0;
                    for (int64_t c = 0; c < DV; ++c) {
                        dp += (double)d_out.get(b, h, i, c) * v.get(b, kv, j, c);
                        d_v[((b * KV + kv) * n_k + j) * DV + c] += weight[j] * d_out.get(b, h, i, c);
                    }
                    double ds = rule == FV_SIGMOID ? weight[j] * (1 - weight[j]) * dp : weight[j] * (dp - delta[row]);
                    ds *= slope[j];
                    for (size_t t = 0; t < terms.size(); ++t) {
                        int64_t at = terms[t].q_code[i] + terms[t].k_code[j] + terms[t].base, size = terms[t].size;
                        d_terms[t][h * size + std::min(std::max<int64_t>(at, 0), size - 1)] += ds;
                    }
                    d_factor[row] += ds * job.scale * dots[j];
                    for (int64_t c = 0; c < D; ++c) {
                        d_q[row * D + c] += ds * job.scale * rows_factor * k.get(b, kv, j, c);
                        d_k[((b * KV + kv) * n_k + j) * D + c] += ds * job.scale * rows_factor * q.get(b, h, i, c);
                    }
                }
            }
    Array<float> delta32(B * H * n_q);
    for (int64_t i = 0; i < delta32.size; ++i) delta32[i] = (float)delta[i];

    for (int isa = 0; isa <= fv_best_isa(); ++isa) {
        std::vector<Results> both;
        const auto state = engine;
        for (int threads : {1, 3}) {
            engine = state;  // the same strides
            Results r{Tensor(dtype, B, H, n_q, DV), Tensor(dtype, B, H, n_q, D), Tensor(dtype, B, KV, n_k, D),
                      Tensor(dtype, B, KV, n_k, DV), Array<float>(B * H * n_q, NOT_A_NUMBER),
                      Array<float>(B * H * n_q, NOT_A_NUMBER), {}};
            job.isa = isa, job.threads = threads;
            job.out = r.out.view(), job.d_q = r.d_q.view(), job.d_k = r.d_k.view(), job.d_v = r.d_v.view();
            job.lse = rule == FV_SOFTMAX ? r.lse.data.get() : nullptr;
            job.delta = rule == FV_SOFTMAX ? delta32.data.get() : nullptr;
            job.d_row_factor = factor ? r.d_factor.data.get() : nullptr;
            for (size_t t = 0; t < terms.size(); ++t) {
                fv_term& to = job.terms[t];
                Term& term = terms[t];
                r.d_terms.emplace_back(B * H * job.slices * term.size, 0.0f);
                to.table = term.table.data.get(), to.grad = r.d_terms[t].data.get(), to.size = term.size;
                to.stride_b = 0, to.stride_h = term.stride_h, to.base = term.base;
                to.grad_stride_b = H * job.slices * term.size, to.grad_stride_h = job.slices * term.size;
                to.grad_stride_slice = term.size;
                to.q_code = term.q_code.data.get(), to.k_code = term.k_code.data.get();
            }
            if (fv_forward(&job)) throw Failure{"fv_forward refused"};
            if (fv_backward_query(&job)) throw Failure{"fv_backward_query refused"};
            if (fv_backward_key(&job)) throw Failure{"fv_backward_key refused"};
            both.push_back(std::move(r));
        }
        Results &r = both[0], &other = both[1];
        const double wide = tolerance * 4;  // gradients
        try {
            for (int64_t b = 0; b < B; ++b)
                for (int64_t h = 0; h < H; ++h)
                    for (int64_t i = 0; i < n_q; ++i) {
                        const int64_t row = (b * H + h) * n_q + i;
                        for (int64_t c = 0; c < DV; ++c)
                            close("out", r.out.get(b, h, i, c), out[row * DV + c], tolerance);
                        for (int64_t c = 0; c < D; ++c) close("d_q", r.d_q.get(b, h, i, c), d_q[row * D + c], wide);
                        if (rule == FV_SOFTMAX) close("lse", r.lse[row], lse[row], tolerance);
                        if (factor) close("d_row_factor", r.d_factor[row], d_factor[row], wide);
                    }
            for (int64_t b = 0; b < B; ++b)
                for (int64_t h = 0; h < KV; ++h)
                    for (int64_t j = 0; j < n_k; ++j) {
                        const int64_t row = (b * KV + h) * n_k + j;
                        for (int64_t c = 0; c < D; ++c) close("d_k", r.d_k.get(b, h, j, c), d_k[row * D + c], wide);
                        for (int64_t c = 0; c < DV; ++c) close("d_v", r.d_v.get(b, h, j, c), d_v[row * DV + c], wide);
                    }
            for (size_t t = 0; t < terms.size(); ++t)
                for (int64_t h = 0; h < H; ++h)
                    for (int64_t at = 0; at < terms[t].size; ++at) {
                        double sum = 0;
                        for (int64_t b = 0; b < B; ++b)
                            for (int64_t s = 0; s < job.slices; ++s)
                                sum += r.d_terms[t][((b * H + h) * job.slices + s) * terms[t].size + at];
                        close("d_term", sum, d_terms[t][h * terms[t].size + at], wide);
                    }
            if (!same(r.out.bytes, other.out.bytes) || !same(r.d_q.bytes, other.d_q.bytes) ||
                !same(r.d_k.bytes, other.d_k.bytes) || !same(r.d_v.bytes, other.d_v.bytes))
                throw Failure{"one thread and three threads differ"};
        } catch (Failure& failure) {
            char where[160];
            std::snprintf(where, sizeof where, " (level %d, dtype %d, rule %d, n_q %lld, n_k %lld, dims %lld and %lld)",
                          isa, dtype, rule, (long long)n_q, (long long)n_k, (long long)D, (long long)DV);
            throw Failure{failure.what + where};
        }
    }
}

}  // namespace

int main(int count, char** arguments) {
    const int64_t cases = count > 1 ? std::atoll(arguments[1]) : 100;
    const int64_t first = count > 2 ? std::atoll(arguments[2]) : 0;
    const int64_t largest = count > 3 ? std::atoll(arguments[3]) : 150;
    for (int64_t seed = first; seed < first + cases; ++seed) {
        try {
            run_case((uint64_t)seed, largest);
            run_scan_case((uint64_t)seed, largest);
        } catch (Failure& failure) {
            std::printf("seed %lld: %s\n", (long long)seed, failure.what.c_str());
            return 1;
        }
    }
    std::printf("%lld cases at levels 0..%d agree with plain loops\n", (long long)cases, fv_best_isa());
    return 0;
}
