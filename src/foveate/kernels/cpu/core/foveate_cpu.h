// The C ABI of foveate's CPU core: gathered tile attention over a flattened Schedule, forward and backward.
// Plain pointers and strides (in elements); no torch, no Python, no global state. The caller validates indices.
#pragma once
#include <stdint.h>

#if defined(__GNUC__)
#define FV_API __attribute__((visibility("default")))  // everything else stays inside the library
#else
#define FV_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { FV_ABI = 4 };
enum { FV_F32 = 0, FV_BF16 = 1, FV_F16 = 2 };
enum { FV_SOFTMAX = 0, FV_SIGMOID = 1 };
enum { FV_PORTABLE = 0, FV_AVX2 = 1, FV_AVX512 = 2, FV_AVX512_BF16 = 3, FV_AMX_BF16 = 4 };
enum { FV_MAX_TERMS = 4 };

// A (B, H, N, D) tensor; the last dimension is contiguous.
typedef struct {
    void* data;
    int64_t stride_b, stride_h, stride_n;
} fv_tensor;

// Cells of one kind: `own` rows lie in lanes and belong to one cell only, `other` rows stream past them.
// Set s (one, or one per batch and head) owns cells [set_ptr[s], set_ptr[s + 1]).
typedef struct {
    const int64_t* set_ptr;
    int64_t set_stride_b, set_stride_h;
    const int64_t* own_ptr;   // per cell: its slice of `own`
    const int32_t* own;       // row ids, at most 64 a cell
    const int64_t* run_ptr;   // per cell: its slice of `runs`
    const int32_t* runs;      // pairs (first row, number of rows)
    const int64_t* mask_ptr;  // per cell: byte offset into `masks`, or -1 where every pair counts
    const uint8_t* masks;     // per `other` row: 8 bytes, bit i set where own row i attends
} fv_cells;

// bias[b, h, q, k] = table[b, h, clamp(q_code[q] + k_code[k] + base, 0, size - 1)]
typedef struct {
    const float* table;
    float* grad;  // like table, with `grad_stride_slice` between the slices of one (b, h); NULL: not wanted
    int64_t stride_b, stride_h, grad_stride_b, grad_stride_h, grad_stride_slice, size;
    const int32_t* q_code;
    const int32_t* k_code;
    int64_t base;
} fv_term;

// Runs fn(data) on at most `threads` threads and returns when all are done.
typedef void (*fv_parallel)(void (*fn)(void* data), void* data, unsigned threads, unsigned flags);

typedef struct {
    int32_t abi, dtype, rule, isa, threads, n_terms;
    int64_t batch, heads, kv_heads, n_q, n_k, dim, dim_v;
    float scale, softcap, sigmoid_bias;  // softcap 0: none
    fv_tensor q, k, v, out;
    const float* row_factor;  // (B|1, H|1, n_q) or NULL; multiplies the logits first
    int64_t row_factor_stride_b, row_factor_stride_h;
    const float* sink;  // (H) logit of an absorbing key, or NULL
    float* lse;         // (B, H, n_q), contiguous
    fv_term terms[FV_MAX_TERMS];
    fv_cells by_query, by_key;
    // backward only
    fv_tensor d_out, d_q, d_k, d_v;
    float* delta;         // (B, H, n_q) contiguous: sum_j out * d_out, minus the gradient of lse
    float* d_row_factor;  // (B, H, n_q) contiguous or NULL
    int64_t slices;       // fixed slices of the cells of one (b, h): the unit of gradient accumulation
    // GOMP_parallel of the OpenMP runtime that the caller's own threads belong to, so that no two pools compete for the
    // cores. NULL: threads of the core's own.
    fv_parallel parallel;
    int64_t finish_delta; // 1: `delta` holds minus the gradient of lse, fv_backward_query adds sum_j out * d_out
} fv_job;

FV_API int fv_best_isa(void);
FV_API int fv_forward(const fv_job* job);
FV_API int fv_backward_query(const fv_job* job);  // d_q, gradients of the terms, d_row_factor
FV_API int fv_backward_key(const fv_job* job);    // d_k, d_v

// Linear attention with decay, fp32: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = q_t S_t. Results are contiguous.
typedef struct {
    int32_t abi, isa, threads, channels, inclusive, unused;  // channels: one decay per channel; inclusive: o_t has pair t
    int64_t batch, heads, n, dim, dim_v;
    int64_t chunk, span;   // tokens: a multiple of 16; a multiple of `chunk`
    int64_t parts, width;  // a task takes `width` columns of v; there are `parts` of them
    fv_tensor q, k, v;
    fv_tensor decay;     // rows of one number, or of `dim`; strides 0 where shared; data NULL: none
    const float* state;  // (B, H, dim, dim_v) before the first token, or NULL: zeros
    float* out;          // (B, H, n, dim_v)
    float* last;         // the state after the last token, or NULL
    float* borders;      // (B, H, (n - 1) / span, dim, dim_v): written by the forward unless NULL, read by the backward
    // backward only
    fv_tensor d_out;
    const float* d_last;  // or NULL
    float* d_q;           // (parts, B, H, n, dim): the gradient is the sum of the parts
    float* d_k;
    float* d_v;
    float* d_decay;       // (parts, B, H, n) or (parts, B, H, n, dim), or NULL
    float* d_state;       // or NULL
    fv_parallel parallel;
} fv_scan;

FV_API int fv_scan_forward(const fv_scan* job);
FV_API int fv_scan_backward(const fv_scan* job);

// Cells that list their ids, int64, -1: absent. Strides in elements over (b, h, cell, row), 0 where shared; `mask` (NULL:
// every pair of present rows) over (b, h, cell, own, other).
typedef struct {
    const int64_t* own;
    const int64_t* other;
    const uint8_t* mask;
    int64_t own_stride[4], other_stride[4], mask_stride[5];
    int64_t cells, n_own, n_other;
} fv_ids;

// Makers of flat cells; rows in none get cells without other rows, so that every row's result is written. `sizes` receives the numbers of cells, own rows, runs and mask words, then whether an id was out
// of range, then whether no row is owned twice. NULL: an id was out of range, or memory ran out (sizes[4] tells).
// `fv_flat_take` copies the arrays out and frees `made`; set_ptr has one entry more than there are sets.
typedef struct fv_flat fv_flat;
FV_API fv_flat* fv_flatten(const fv_ids* groups, int64_t n_groups, int64_t lead_b, int64_t lead_h, int64_t n_own,
                           int64_t n_other, int32_t threads, int64_t* sizes);
// Own and other rows exchanged; each other row is owned by one new cell at most.
FV_API fv_flat* fv_transpose(const fv_cells* cells, int64_t sets, int64_t n_other, int32_t threads, int64_t* sizes);
FV_API void fv_flat_take(fv_flat* made, int64_t* set_ptr, int64_t* own_ptr, int32_t* own, int64_t* run_ptr, int32_t* runs,
                         int64_t* mask_ptr, uint64_t* masks);

#ifdef __cplusplus
}
#endif
