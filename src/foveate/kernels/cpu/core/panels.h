// Products of row-major fp32 panels, and panels filled from memory. Rows are padded with zeros to whole vectors and
// panels to multiples of 16 rows, so that no tail kernel exists.
#pragma once
#include "foveate_cpu.h"
#include "turn.h"

namespace FV_NAMESPACE {

constexpr int ROWS = 16;  // panels have multiples of this many rows

static inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// to[r][..] = (or +=) sum over i in [first, last) of a[r][i] * b[i][..]; with TURNED it is a[i][r].
template <bool TURNED, int R, int NV>
static inline void product_block(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t first, int64_t last,
                                 float* to, int64_t ld, bool add) {
    vfa acc[R][NV];
    const float* row[R];
    for (int r = 0; r < R; ++r) {
        row[r] = a + r * lda;
        for (int v = 0; v < NV; ++v) acc[r][v] = vfa{};
    }
    for (int64_t i = first; i < last; ++i) {
        vfa x[NV];
        for (int v = 0; v < NV; ++v) x[v] = load(b + i * ldb + v * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const vfa y = splat(TURNED ? a[i * lda + r] : row[r][i]);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) acc[r][v] += y * x[v];
        }
    }
    // What was there is added last: a state that grew over many tokens is rounded once for a chunk, not for every token.
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < NV; ++v) {
            float* at = to + r * ld + v * W;
            store(at, add ? load(at) + acc[r][v] : acc[r][v]);
        }
}

// What of a product of lower triangular panels is not zero, and so is computed.
enum Part {
    WHOLE,
    LOWER,   // the result: columns up to the row
    BEFORE,  // a[r][i]: i up to the row
    AFTER,   // a[i][r]: i from the row on
};

// m is a multiple of 8, n of W.
template <bool TURNED>
static void product(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t m, int64_t n, int64_t k, float* to,
                    int64_t ld, bool add, Part part = WHOLE) {
    constexpr int R = W == 16 ? 8 : 4;
    for (int64_t r = 0; r < m; r += R) {
        const int64_t width = part == LOWER && up(r + R, ROWS) < n ? up(r + R, ROWS) : n;
        const int64_t first = part == AFTER ? r : 0, last = part == BEFORE && r + R < k ? r + R : k;
        const float* from = a + (TURNED ? r : r * lda);
        float* at = to + r * ld;
        int64_t c = 0;
        if constexpr (W == 16)
            for (; c + 4 * W <= width; c += 4 * W)
                for (int h = 0; h < R; h += 4)
                    product_block<TURNED, 4, 4>(from + (TURNED ? h : h * lda), lda, b + c, ldb, first, last,
                                                at + h * ld + c, ld, add);
        for (; c + 2 * W <= width; c += 2 * W)
            product_block<TURNED, R, 2>(from, lda, b + c, ldb, first, last, at + c, ld, add);
        for (; c < width; c += W) product_block<TURNED, R, 1>(from, lda, b + c, ldb, first, last, at + c, ld, add);
    }
}

static inline void zero(float* to, int64_t n) {
    for (int64_t i = 0; i < n; i += W) store(to + i, vfa{});
}

// n rows of `width` numbers with `stride` between them into a panel of `rows` rows and ld columns, zeros around them.
static inline void fill(float* to, int64_t ld, int64_t rows, const float* from, int64_t stride, int64_t n, int64_t width) {
    for (int64_t i = 0; i < n; ++i) {
        int64_t j = 0;
        for (; j + W <= width; j += W) store(to + i * ld + j, load(from + i * stride + j));
        for (; j < width; ++j) to[i * ld + j] = from[i * stride + j];
        for (; j < ld; ++j) to[i * ld + j] = 0;
    }
    zero(to + n * ld, (rows - n) * ld);
}

// The other way: n rows of a panel to where they belong.
static inline void empty(float* to, int64_t stride, const float* from, int64_t ld, int64_t n, int64_t width) {
    for (int64_t i = 0; i < n; ++i) {
        int64_t j = 0;
        for (; j + W <= width; j += W) store(to + i * stride + j, load(from + i * ld + j));
        for (; j < width; ++j) to[i * stride + j] = from[i * ld + j];
    }
}

static inline float total(vfa x) {
    float sum = 0;
    for (int l = 0; l < W; ++l) sum += x[l];
    return sum;
}

static inline float inner(const float* a, const float* b, int64_t n) {
    vfa sum = vfa{};
    for (int64_t i = 0; i < n; i += W) sum += load(a + i) * load(b + i);
    return total(sum);
}

// to[i] = x * y[i] in whole vectors.
static inline void times(float* to, vfa x, const float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += W) store(to + i, x * load(y + i));
}

}  // namespace FV_NAMESPACE
