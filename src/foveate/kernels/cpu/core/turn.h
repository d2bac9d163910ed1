// Transposed panels.
#pragma once
#include "simd.h"

namespace FV_NAMESPACE {

#if defined(__has_builtin)
#if __has_builtin(__builtin_shuffle)
#define FV_SHUFFLE
#endif
#endif

// to[c][r] = from[r][c]; rows and columns are multiples of W.
static inline void turn(const float* from, int64_t ld, int64_t rows, int64_t columns, float* to, int64_t ld_to) {
#if defined(FV_SHUFFLE)
    // Squares of W x W: step s exchanges bit s of the row's number with bit s of the lane's.
    for (int64_t r = 0; r < rows; r += W)
        for (int64_t c = 0; c < columns; c += W) {
            vfa x[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) x[i] = load(from + (r + i) * ld + c);
#pragma GCC unroll 4
            for (int s = 1; s < W; s *= 2) {
                vi even, odd;
#pragma GCC unroll 16
                for (int l = 0; l < W; ++l) even[l] = l & s ? W + l - s : l, odd[l] = l & s ? W + l : l + s;
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i)
                    if (!(i & s)) {
                        const vfa low = x[i], high = x[i + s];
                        x[i] = __builtin_shuffle(low, high, even), x[i + s] = __builtin_shuffle(low, high, odd);
                    }
            }
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) store(to + (c + i) * ld_to + r, x[i]);
        }
#else
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) to[c * ld_to + r] = from[r * ld + c];
#endif
}

}  // namespace FV_NAMESPACE
