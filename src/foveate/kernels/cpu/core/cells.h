// One cell of a Schedule: its own rows lie in vector lanes, the other rows stream past in chunks.
// Forward and the gradient of the queries take query cells (keys stream); the gradient of keys and values takes key
// cells of the transposed Schedule (queries stream). Weights are recomputed from lse, never stored.
#pragma once
#include "products.h"
#include "rows.h"
#include "turn.h"

extern "C" float logf(float);

namespace FV_NAMESPACE {

constexpr float NEG = -1e30f;  // stands for -inf where a difference of two must not be NaN

// Everything a thread needs; lives in one aligned block of `workspace_bytes`.
struct Workspace {
    float *lanes_a, *lanes_b;  // [256][64]: rows of the cell, transposed
    float *rows_a, *rows_b;    // [CHUNK][ld]
    float *st, *dp, *slope;    // [CHUNK][64]: logits then weights; d weights; d cap(s) / ds
    float *acc_a, *acc_b;      // [64][ld]
    float *pairs_st, *pairs_rows;  // bf16 pairs of st and of a row panel
    int32_t* ids;              // [CHUNK]
};

constexpr int64_t FLOATS = 2 * 256 * 64 + 3 * CHUNK * 256 + 4 * CHUNK * 64 + 2 * 64 * 256 + CHUNK + 64;

static inline Workspace carve(float* p) {
    Workspace w;
    w.lanes_a = p, p += 256 * 64;
    w.lanes_b = p, p += 256 * 64;
    w.rows_a = p, p += CHUNK * 256;
    w.rows_b = p, p += CHUNK * 256;
    w.st = p, p += CHUNK * 64;
    w.dp = p, p += CHUNK * 64;
    w.slope = p, p += CHUNK * 64;
    w.acc_a = p, p += 64 * 256;
    w.acc_b = p, p += 64 * 256;
    w.pairs_st = p, p += CHUNK * 64;
    w.pairs_rows = p, p += CHUNK * 256;
    w.ids = (int32_t*)p;
    return w;
}

static inline int padded(int d) { return d <= 32 ? 32 : d <= 64 ? 64 : d <= 128 ? 128 : 256; }
static inline int lanes_for(int n) { return n <= 16 ? 16 : n <= 32 ? 32 : 64; }
static inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Walks the runs of a cell chunk by chunk.
struct Stream {
    const int32_t* runs;
    int64_t n_runs, run = 0;
    int32_t within = 0;
    int next(int32_t* ids) {
        int n = 0;
        while (n < CHUNK && run < n_runs) {
            int32_t start = runs[2 * run], length = runs[2 * run + 1];
            while (n < CHUNK && within < length) ids[n++] = start + within++;
            if (within == length) ++run, within = 0;
        }
        return n;
    }
};

// How rows are kept while they are multiplied: fp32 with the scale inside, or bf16 as they came with the scale applied
// to the logits in fp32. `Full` serves every dtype; `Half` only bf16 tensors, where the CPU multiplies bf16.
struct Full {
    static constexpr bool scaled = true;
    static int step(int n_lanes) { return row_step(n_lanes); }
    // `panel` is scratch of [64][256].
    static void lanes(float* to, const fv_tensor& t, int64_t base, const int32_t* ids, int n, int n_lanes, int d, int dtype,
                      const float* factors, float scale, float* panel) {
        const int ld = round_up(d, W);
        for (int i = 0; i < n; ++i) {
            float* row = panel + (int64_t)i * ld;
            read_row(row, t.data, base + ids[i] * t.stride_n, d, dtype, factors ? factors[ids[i]] * scale : scale);
            for (int j = d; j < ld; ++j) row[j] = 0;
        }
        std::memset(panel + (int64_t)n * ld, 0, sizeof(float) * (n_lanes - n) * ld);
        turn(panel, ld, n_lanes, ld, to, n_lanes);
    }
    static void rows(float* to, const fv_tensor& t, int64_t base, const int32_t* ids, int n, int n_padded, int d, int ld,
                     int dtype, const float* factors, float scale) {
        int width = round_up(d, 2 * W) < ld ? round_up(d, 2 * W) : ld;
        for (int i = 0; i < n; ++i) {
            read_row(to + (int64_t)i * ld, t.data, base + ids[i] * t.stride_n, d, dtype,
                     factors ? factors[ids[i]] * scale : scale);
            for (int j = d; j < width; ++j) to[(int64_t)i * ld + j] = 0;
        }
        for (int i = n; i < n_padded; ++i)
            for (int j = 0; j < width; ++j) to[(int64_t)i * ld + j] = 0;
    }
    static void multiply(const float* rows, int ld, int n_rows, const float* lanes, int n_lanes, int d, float* st) {
        dots(rows, ld, n_rows, lanes, n_lanes, d, st);
    }
    // Every lane of one panel with the same lane of another, in the order of `multiply`.
    static void inner(const float* a, const float* b, int n_lanes, int d, float* to) {
        for (int l = 0; l < n_lanes; l += W) {
            vfa acc = vfa{};
            for (int i = 0; i < d; ++i) acc += load(a + (int64_t)i * n_lanes + l) * load(b + (int64_t)i * n_lanes + l);
            store(to + l, acc);
        }
    }
    static void add(const float* st, int n_lanes, int used, const float* rows, int ld, int n, int width, float* out,
                    Workspace&) {
        blend(st, n_lanes, used, rows, ld, n, width, out);
    }
};

#if defined(__AVX512BF16__)
struct Half {
    static constexpr bool scaled = false;
#if defined(FV_AMX)
    static constexpr int depth = DEEP;  // products sum this many numbers at a time
    static int step(int) { return TILE; }
#else
    static constexpr int depth = 2;
    static int step(int n_lanes) { return row_step(n_lanes); }
#endif
    static void lanes(float* to, const fv_tensor& t, int64_t base, const int32_t* ids, int n, int n_lanes, int d, int,
                      const float*, float, float* panel) {
        const int ld = round_up(d, 2 * W) / 2;  // words: two neighbours of a row in one, which move together
        for (int i = 0; i < n; ++i) {
            uint16_t* row = (uint16_t*)(panel + (int64_t)i * ld);
            std::memcpy(row, (const uint16_t*)t.data + base + ids[i] * t.stride_n, 2 * d);
            std::memset(row + d, 0, 2 * (2 * ld - d));
        }
        std::memset(panel + (int64_t)n * ld, 0, sizeof(float) * (n_lanes - n) * ld);
        turn(panel, ld, n_lanes, ld, to, n_lanes);  // to[d / 2][lane]
    }
    static void rows(float* to, const fv_tensor& t, int64_t base, const int32_t* ids, int n, int n_padded, int d, int ld, int,
                     const float*, float) {
        uint16_t* panel = (uint16_t*)to;
        for (int i = 0; i < n_padded; ++i) {
            uint16_t* row = panel + (int64_t)i * ld;
            int filled = 0;
            if (i < n) std::memcpy(row, (const uint16_t*)t.data + base + ids[i] * t.stride_n, 2 * (filled = d));
            std::memset(row + filled, 0, 2 * (ld - filled));
        }
    }
    static void inner(const float* a, const float* b, int n_lanes, int d, float* to) {
        for (int l = 0; l < n_lanes; l += W) {
            __m512 acc = _mm512_setzero_ps();
            for (int i = 0; i < d / 2; ++i)
                acc = _mm512_dpbf16_ps(acc, (__m512bh)_mm512_loadu_si512(a + (int64_t)i * n_lanes + l),
                                       (__m512bh)_mm512_loadu_si512(b + (int64_t)i * n_lanes + l));
            _mm512_storeu_ps(to + l, acc);
        }
    }
    static void multiply(const float* rows, int ld, int n_rows, const float* lanes, int n_lanes, int d, float* st) {
#if defined(FV_AMX)
        tile_product((const uint16_t*)rows, ld, n_rows, (const uint16_t*)lanes, 2 * n_lanes, n_lanes, round_up(d, depth), st,
                     n_lanes, false);
#else
        dots((const uint16_t*)rows, ld, n_rows, (const uint16_t*)lanes, n_lanes, d, st);
#endif
    }
    static void add(const float* st, int n_lanes, int used, const float* rows, int ld, int n, int width, float* out,
                    Workspace& w) {
        uint16_t *turned = (uint16_t*)w.pairs_st, *paired = (uint16_t*)w.pairs_rows;
        pair_panel((const uint16_t*)rows, ld, n, width, paired);
#if defined(FV_AMX)
        const int deep = round_up(n, depth);
        for (int r = round_up(n, 2); r < deep; r += 2) std::memset(paired + (int64_t)r * ld, 0, 4 * width);
        turn_rows(st, n_lanes, used, n, turned, CHUNK);
        tile_product(turned, CHUNK, round_up(used, TILE), paired, 2 * ld, width, deep, out, ld, true);
#else
        pair_rows(st, n_lanes, n, turned);
        blend(turned, n_lanes, used, paired, ld, n, width, out, ld);
#endif
    }
};
#endif

// Multiplies logits by `scale` and the row factors, for panels that do not carry them.
static inline void scale_logits(float* st, int n, int n_lanes, float scale, const float* factors, const int32_t* rows,
                                const int32_t* lanes, int used, bool lanes_are_queries) {
    float by_lane[64];
    for (int l = 0; l < n_lanes; ++l)
        by_lane[l] = lanes_are_queries && factors && l < used ? factors[lanes[l]] * scale : scale;
    for (int i = 0; i < n; ++i) {
        vfa row = splat(!lanes_are_queries && factors ? factors[rows[i]] : 1.0f);
        for (int l = 0; l < n_lanes; l += W) {
            float* at = st + (int64_t)i * n_lanes + l;
            store(at, load(at) * load(by_lane + l) * row);
        }
    }
}

static inline vfa tanh_pos(vfa x) {  // x >= 0
    vfa e = exp_neg(x * -2.0f);
    return (splat(1.0f) - e) / (splat(1.0f) + e);
}

// The codes of a term for the lanes of a cell, and whether they are all the same (one number for a whole row).
struct LaneCodes {
    int32_t code[64];
    bool same;
    LaneCodes(const int32_t* codes, const int32_t* lanes, int used, int n_lanes) {
        same = true;
        for (int l = 0; l < n_lanes; ++l) {
            code[l] = codes[lanes[l < used ? l : 0]];
            same &= code[l] == code[0];
        }
    }
};

static inline int32_t clamp_index(int64_t at, int64_t size) {
    return (int32_t)(at < 0 ? 0 : at >= size ? size - 1 : at);
}

// Adds the gathered biases, then the soft-cap; `slope` (or NULL) receives the cap's derivative.
static inline void add_terms(const fv_job& job, int64_t b, int64_t h, float* st, float* slope, int n, const int32_t* rows,
                             int n_lanes, const int32_t* lanes, int used, bool rows_are_keys) {
    for (int t = 0; t < job.n_terms; ++t) {
        const fv_term& term = job.terms[t];
        const float* table = term.table + b * term.stride_b + h * term.stride_h;
        const int32_t* row_code = rows_are_keys ? term.k_code : term.q_code;
        const LaneCodes codes(rows_are_keys ? term.q_code : term.k_code, lanes, used, n_lanes);
        const vi zero = vi{}, last = (int32_t)(term.size - 1) - vi{};
        for (int i = 0; i < n; ++i) {
            const int32_t code = (int32_t)(row_code[rows[i]] + term.base);
            float* row = st + (int64_t)i * n_lanes;
            if (codes.same) {
                const vfa bias = splat(table[clamp_index((int64_t)code + codes.code[0], term.size)]);
                for (int l = 0; l < n_lanes; l += W) store(row + l, load(row + l) + bias);
                continue;
            }
            for (int l = 0; l < n_lanes; l += W) {
                vi at;
                std::memcpy(&at, codes.code + l, sizeof at);
                at += code;
                at = at < zero ? zero : at;
                at = at > last ? last : at;
                store(row + l, load(row + l) + gather(table, at));
            }
        }
    }
    if (job.softcap > 0) {
        vfa cap = splat(job.softcap), inverse = splat(1.0f / job.softcap);
        for (int i = 0; i < n * n_lanes; i += W) {
            vfa x = load(st + i) * inverse;
            vfa t = tanh_pos(maxv(x, -x));
            if (slope) store(slope + i, splat(1.0f) - t * t);
            store(st + i, (x < vfa{} ? -t : t) * cap);
        }
    }
}

static inline uint32_t lane_bits(const uint8_t* mask, int64_t row, int lane) {
    uint64_t bits;
    std::memcpy(&bits, mask + row * 8, 8);
    return (uint32_t)(bits >> lane) & (W == 16 ? 0xffffu : (1u << W) - 1u);
}

static inline vfa sigmoid(vfa x) {
    vfa e = exp_neg(-maxv(x, -x));
    vfa top = x < vfa{} ? e : splat(1.0f);
    return top / (splat(1.0f) + e);
}

// Logits -> weights, given each row's or lane's lse; masked pairs get 0.
static inline void weights(const fv_job& job, float* st, int n, int n_lanes, const uint8_t* mask, int64_t row0,
                           const float* lse_lane, const float* lse_row) {
    for (int i = 0; i < n; ++i)
        for (int l = 0; l < n_lanes; l += W) {
            float* at = st + (int64_t)i * n_lanes + l;
            vfa s = load(at), p;
            if (job.rule == FV_SIGMOID) {
                p = sigmoid(s + splat(job.sigmoid_bias));
            } else {
                vfa z = s - (lse_row ? splat(lse_row[i]) : load(lse_lane + l));
                p = exp_neg(z < vfa{} ? z : vfa{});
            }
            if (mask) p = select_bits(lane_bits(mask, row0 + i, l), p, vfa{});
            store(at, p);
        }
}

template <class P>
static void forward_cell(const fv_job& job, int64_t b, int64_t h, const fv_cells& cells, int64_t c, Workspace& w) {
    const int32_t* own = cells.own + cells.own_ptr[c];
    const int used = (int)(cells.own_ptr[c + 1] - cells.own_ptr[c]);
    if (!used) return;  // no row whose codes could stand in for those of empty lanes
    const int n_lanes = lanes_for(used), step = P::step(n_lanes);
    const uint8_t* mask = cells.mask_ptr[c] < 0 ? nullptr : cells.masks + cells.mask_ptr[c];
    int d = (int)job.dim, dv = (int)job.dim_v, ld_k = padded(d), ld_v = padded(dv), width = round_up(dv, 2 * W);
    int64_t hk = h / (job.heads / job.kv_heads);
    const float* factors =
        job.row_factor ? job.row_factor + b * job.row_factor_stride_b + h * job.row_factor_stride_h : nullptr;
    P::lanes(w.lanes_a, job.q, b * job.q.stride_b + h * job.q.stride_h, own, used, n_lanes, d, job.dtype, factors,
               job.scale, w.rows_a);
    float top[64], sum[64], shrink[64];
    for (int i = 0; i < 64; ++i) top[i] = job.sink ? job.sink[h] : NEG, sum[i] = job.sink ? 1.0f : 0.0f;
    std::memset(w.acc_a, 0, sizeof(float) * n_lanes * ld_v);
    Stream stream{cells.runs + 2 * cells.run_ptr[c], cells.run_ptr[c + 1] - cells.run_ptr[c]};
    int64_t row0 = 0;
    for (int n; (n = stream.next(w.ids)); row0 += n) {
        int n_padded = round_up(n, step);
        P::rows(w.rows_a, job.k, b * job.k.stride_b + hk * job.k.stride_h, w.ids, n, n_padded, d, ld_k, job.dtype,
                  nullptr, 1);
        P::rows(w.rows_b, job.v, b * job.v.stride_b + hk * job.v.stride_h, w.ids, n, n, dv, ld_v, job.dtype, nullptr, 1);
        P::multiply(w.rows_a, ld_k, n_padded, w.lanes_a, n_lanes, d, w.st);
        if (!P::scaled) scale_logits(w.st, n, n_lanes, job.scale, factors, w.ids, own, used, true);
        add_terms(job, b, h, w.st, nullptr, n, w.ids, n_lanes, own, used, true);
        if (job.rule == FV_SIGMOID) {
            weights(job, w.st, n, n_lanes, mask, row0, nullptr, nullptr);
        } else {
            bool rescale = false;
            for (int l = 0; l < n_lanes; l += W) {
                vfa old = load(top + l), m = old;
                for (int i = 0; i < n; ++i) {
                    float* at = w.st + (int64_t)i * n_lanes + l;
                    vfa s = load(at);
                    if (mask) {
                        s = select_bits(lane_bits(mask, row0 + i, l), s, splat(-std::numeric_limits<float>::infinity()));
                        store(at, s);
                    }
                    m = maxv(s, m);
                }
                vfa a = exp_neg(old - m), total = load(sum + l) * a;
                for (int i = 0; i < n; ++i) {
                    float* at = w.st + (int64_t)i * n_lanes + l;
                    vfa p = exp_neg(load(at) - m);
                    total += p;
                    store(at, p);
                }
                store(top + l, m), store(sum + l, total), store(shrink + l, a);
                for (int i = 0; i < W; ++i) rescale |= shrink[l + i] != 1.0f;
            }
            if (row0 && rescale)
                for (int i = 0; i < used; ++i)
                    for (int j = 0; j < width; j += W) {
                        float* at = w.acc_a + (int64_t)i * ld_v + j;
                        store(at, load(at) * splat(shrink[i]));
                    }
        }
        P::add(w.st, n_lanes, used, w.rows_b, ld_v, n, width, w.acc_a, w);
    }
    for (int i = 0; i < used; ++i) {
        float inverse = job.rule == FV_SIGMOID ? 1.0f : sum[i] > 0 ? 1.0f / sum[i] : 0.0f;
        write_row(job.out.data, b * job.out.stride_b + h * job.out.stride_h + own[i] * job.out.stride_n,
                  w.acc_a + (int64_t)i * ld_v, dv, job.dtype, inverse);
        if (job.lse)
            job.lse[(b * job.heads + h) * job.n_q + own[i]] =
                sum[i] > 0 ? top[i] + logf(sum[i]) : -std::numeric_limits<float>::infinity();
    }
}

// d weights -> d logits in `st` (which holds the weights), through the rule and the soft-cap.
static inline void d_logits(const fv_job& job, float* st, const float* dp, const float* slope, int n, int n_lanes,
                            const float* delta_lane, const float* delta_row) {
    for (int i = 0; i < n; ++i)
        for (int l = 0; l < n_lanes; l += W) {
            int64_t at = (int64_t)i * n_lanes + l;
            vfa p = load(st + at), g = load(dp + at);
            if (job.rule == FV_SIGMOID) g = p * (splat(1.0f) - p) * g;
            else g = p * (g - (delta_row ? splat(delta_row[i]) : load(delta_lane + l)));
            if (job.softcap > 0) g *= load(slope + at);
            store(st + at, g);
        }
}

// Adds the gradients of the logits up into the tables they came from.
static inline void grade_terms(const fv_job& job, int64_t b, int64_t h, int64_t slice, const float* st, int n,
                               const int32_t* keys, int n_lanes, const int32_t* queries, int used) {
    for (int t = 0; t < job.n_terms; ++t) {
        const fv_term& term = job.terms[t];
        if (!term.grad) continue;
        float* grad = term.grad + b * term.grad_stride_b + h * term.grad_stride_h + slice * term.grad_stride_slice;
        const LaneCodes codes(term.q_code, queries, used, n_lanes);
        for (int i = 0; i < n; ++i) {
            const int64_t code = term.k_code[keys[i]] + term.base;
            const float* row = st + (int64_t)i * n_lanes;
            if (codes.same) {
                float sum = 0;
                for (int l = 0; l < used; ++l) sum += row[l];
                grad[clamp_index(code + codes.code[0], term.size)] += sum;
            } else {
                for (int l = 0; l < used; ++l) grad[clamp_index(code + codes.code[l], term.size)] += row[l];
            }
        }
    }
}

template <class P>
static void query_cell(const fv_job& job, int64_t b, int64_t h, const fv_cells& cells, int64_t c, int64_t slice,
                       Workspace& w) {
    const int32_t* own = cells.own + cells.own_ptr[c];
    const int used = (int)(cells.own_ptr[c + 1] - cells.own_ptr[c]);
    if (!used) return;  // no row whose codes could stand in for those of empty lanes
    const int n_lanes = lanes_for(used), step = P::step(n_lanes);
    const uint8_t* mask = cells.mask_ptr[c] < 0 ? nullptr : cells.masks + cells.mask_ptr[c];
    int d = (int)job.dim, dv = (int)job.dim_v, ld_k = padded(d), ld_v = padded(dv), width = round_up(d, 2 * W);
    int64_t hk = h / (job.heads / job.kv_heads), row_of = (b * job.heads + h) * job.n_q;
    const float* factors =
        job.row_factor ? job.row_factor + b * job.row_factor_stride_b + h * job.row_factor_stride_h : nullptr;
    P::lanes(w.lanes_a, job.q, b * job.q.stride_b + h * job.q.stride_h, own, used, n_lanes, d, job.dtype, factors,
               job.scale, w.rows_a);
    P::lanes(w.lanes_b, job.d_out, b * job.d_out.stride_b + h * job.d_out.stride_h, own, used, n_lanes, dv, job.dtype,
               nullptr, 1, w.rows_a);
    float lse[64], delta[64];
    for (int i = 0; i < 64; ++i) {
        float value = i < used && job.lse ? job.lse[row_of + own[i]] : 0;
        lse[i] = value < NEG ? -NEG : value;  // a row with no key: weights exp(-huge) = 0
        delta[i] = i < used && job.delta ? job.delta[row_of + own[i]] : 0;
    }
    if (job.finish_delta) {
        // Summed in the order of d weights, so that where one key has all the weight the two cancel exactly.
        P::lanes(w.acc_b, job.out, b * job.out.stride_b + h * job.out.stride_h, own, used, n_lanes, dv, job.dtype, nullptr, 1,
                 w.rows_a);
        float dot[64];
        P::inner(w.acc_b, w.lanes_b, n_lanes, dv, dot);
        for (int i = 0; i < used; ++i) job.delta[row_of + own[i]] = delta[i] += dot[i];
    }
    std::memset(w.acc_a, 0, sizeof(float) * n_lanes * ld_k);
    Stream stream{cells.runs + 2 * cells.run_ptr[c], cells.run_ptr[c + 1] - cells.run_ptr[c]};
    int64_t row0 = 0;
    for (int n; (n = stream.next(w.ids)); row0 += n) {
        int n_padded = round_up(n, step);
        P::rows(w.rows_a, job.k, b * job.k.stride_b + hk * job.k.stride_h, w.ids, n, n_padded, d, ld_k, job.dtype,
                  nullptr, 1);
        P::rows(w.rows_b, job.v, b * job.v.stride_b + hk * job.v.stride_h, w.ids, n, n_padded, dv, ld_v, job.dtype,
                  nullptr, 1);
        P::multiply(w.rows_a, ld_k, n_padded, w.lanes_a, n_lanes, d, w.st);
        if (!P::scaled) scale_logits(w.st, n, n_lanes, job.scale, factors, w.ids, own, used, true);
        add_terms(job, b, h, w.st, w.slope, n, w.ids, n_lanes, own, used, true);
        weights(job, w.st, n, n_lanes, mask, row0, lse, nullptr);
        P::multiply(w.rows_b, ld_v, n_padded, w.lanes_b, n_lanes, dv, w.dp);
        d_logits(job, w.st, w.dp, w.slope, n, n_lanes, delta, nullptr);
        grade_terms(job, b, h, slice, w.st, n, w.ids, n_lanes, own, used);
        P::add(w.st, n_lanes, used, w.rows_a, ld_k, n, width, w.acc_a, w);
    }
    for (int i = 0; i < used; ++i) {
        const float* g = w.acc_a + (int64_t)i * ld_k;
        float factor = factors ? factors[own[i]] : 1.0f;
        write_row(job.d_q.data, b * job.d_q.stride_b + h * job.d_q.stride_h + own[i] * job.d_q.stride_n, g, d, job.dtype,
                  factor * job.scale);
        if (job.d_row_factor) {
            read_row(w.rows_a, job.q.data, b * job.q.stride_b + h * job.q.stride_h + own[i] * job.q.stride_n, d, job.dtype,
                     job.scale);
            float dot = 0;
            for (int j = 0; j < d; ++j) dot += w.rows_a[j] * g[j];
            job.d_row_factor[row_of + own[i]] = dot;
        }
    }
}

// Keys of one cell and one kv head: sums over the query heads that share it.
template <class P>
static void key_cell(const fv_job& job, int64_t b, int64_t hk, const fv_cells& cells, int64_t c, Workspace& w) {
    const int32_t* own = cells.own + cells.own_ptr[c];
    const int used = (int)(cells.own_ptr[c + 1] - cells.own_ptr[c]);
    if (!used) return;  // no row whose codes could stand in for those of empty lanes
    const int n_lanes = lanes_for(used), step = P::step(n_lanes);
    const uint8_t* mask = cells.mask_ptr[c] < 0 ? nullptr : cells.masks + cells.mask_ptr[c];
    int d = (int)job.dim, dv = (int)job.dim_v, ld_k = padded(d), ld_v = padded(dv);
    int width_k = round_up(d, 2 * W), width_v = round_up(dv, 2 * W);
    int64_t group = job.heads / job.kv_heads;
    P::lanes(w.lanes_a, job.k, b * job.k.stride_b + hk * job.k.stride_h, own, used, n_lanes, d, job.dtype, nullptr, 1,
               w.rows_a);
    P::lanes(w.lanes_b, job.v, b * job.v.stride_b + hk * job.v.stride_h, own, used, n_lanes, dv, job.dtype, nullptr, 1,
               w.rows_a);
    std::memset(w.acc_a, 0, sizeof(float) * n_lanes * ld_k);
    std::memset(w.acc_b, 0, sizeof(float) * n_lanes * ld_v);
    float lse[CHUNK], delta[CHUNK];
    for (int64_t h = hk * group; h < (hk + 1) * group; ++h) {
        const float* factors =
            job.row_factor ? job.row_factor + b * job.row_factor_stride_b + h * job.row_factor_stride_h : nullptr;
        int64_t row_of = (b * job.heads + h) * job.n_q;
        Stream stream{cells.runs + 2 * cells.run_ptr[c], cells.run_ptr[c + 1] - cells.run_ptr[c]};
        int64_t row0 = 0;
        for (int n; (n = stream.next(w.ids)); row0 += n) {
            int n_padded = round_up(n, step);
            P::rows(w.rows_a, job.q, b * job.q.stride_b + h * job.q.stride_h, w.ids, n, n_padded, d, ld_k, job.dtype,
                      factors, job.scale);
            P::rows(w.rows_b, job.d_out, b * job.d_out.stride_b + h * job.d_out.stride_h, w.ids, n, n_padded, dv, ld_v,
                      job.dtype, nullptr, 1);
            for (int i = 0; i < n; ++i) {
                float value = job.lse ? job.lse[row_of + w.ids[i]] : 0;
                lse[i] = value < NEG ? -NEG : value;
                delta[i] = job.delta ? job.delta[row_of + w.ids[i]] : 0;
            }
            P::multiply(w.rows_a, ld_k, n_padded, w.lanes_a, n_lanes, d, w.st);
            if (!P::scaled) scale_logits(w.st, n, n_lanes, job.scale, factors, w.ids, own, used, false);
            add_terms(job, b, h, w.st, w.slope, n, w.ids, n_lanes, own, used, false);
            weights(job, w.st, n, n_lanes, mask, row0, nullptr, lse);
            P::multiply(w.rows_b, ld_v, n_padded, w.lanes_b, n_lanes, dv, w.dp);
            P::add(w.st, n_lanes, used, w.rows_b, ld_v, n, width_v, w.acc_b, w);
            d_logits(job, w.st, w.dp, w.slope, n, n_lanes, nullptr, delta);
            if (!P::scaled) scale_logits(w.st, n, n_lanes, job.scale, factors, w.ids, own, used, false);
            P::add(w.st, n_lanes, used, w.rows_a, ld_k, n, width_k, w.acc_a, w);
        }
    }
    for (int i = 0; i < used; ++i) {
        write_row(job.d_k.data, b * job.d_k.stride_b + hk * job.d_k.stride_h + own[i] * job.d_k.stride_n,
                  w.acc_a + (int64_t)i * ld_k, d, job.dtype, 1);
        write_row(job.d_v.data, b * job.d_v.stride_b + hk * job.d_v.stride_h + own[i] * job.d_v.stride_n,
                  w.acc_b + (int64_t)i * ld_v, dv, job.dtype, 1);
    }
}

}  // namespace FV_NAMESPACE
