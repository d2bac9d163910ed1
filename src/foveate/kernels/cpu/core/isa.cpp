// Compiled once per instruction set with FV_W and FV_NAMESPACE set. Uses nothing of the standard library that is
// inline: the linker keeps one copy of an inline function, and it could be the one for the newest CPU.
#include "cells.h"
#include "scan_backward.h"

namespace FV_NAMESPACE {

template <class P>
static void run_cell(int kind, const fv_job& job, int64_t b, int64_t h, const fv_cells& cells, int64_t c, int64_t slice,
                     Workspace& w) {
    if (kind == 0) forward_cell<P>(job, b, h, cells, c, w);
    else if (kind == 1) query_cell<P>(job, b, h, cells, c, slice, w);
    else key_cell<P>(job, b, h, cells, c, w);
}

// Runs tasks [begin, end). A task is one cell, or one slice of the cells of a (b, h) when gradients are accumulated.
void run(int kind, const fv_job& job, int64_t begin, int64_t end, float* memory) {
    Workspace w = carve(memory);
    const fv_cells& cells = kind == 2 ? job.by_key : job.by_query;
    int64_t heads = kind == 2 ? job.kv_heads : job.heads, slices = job.slices;
#if defined(FV_AMX)
    const Tiles configured;
    (void)configured;
#endif
    for (int64_t task = begin; task < end; ++task) {
        int64_t slice = task % slices, b = task / slices / heads, h = task / slices % heads;
        int64_t set = b * cells.set_stride_b + h * cells.set_stride_h;
        int64_t first = cells.set_ptr[set], n = cells.set_ptr[set + 1] - first;
        for (int64_t c = first + n * slice / slices; c < first + n * (slice + 1) / slices; ++c) {
#if defined(__AVX512BF16__)
            if (job.dtype == FV_BF16) {
                run_cell<Half>(kind, job, b, h, cells, c, slice, w);
                continue;
            }
#endif
            run_cell<Full>(kind, job, b, h, cells, c, slice, w);
        }
    }
}

int64_t workspace_floats() { return FLOATS; }

void scan(int backward, const fv_scan& job, int64_t task, float* memory) {
    if (backward) job.channels ? scan_backward<Channels>(job, task, memory) : scan_backward<Table>(job, task, memory);
    else job.channels ? scan_forward<Channels>(job, task, memory) : scan_forward<Table>(job, task, memory);
}

int64_t scan_floats(int backward, const fv_scan& job) { return backward ? backward_floats(job) : forward_floats(job); }

}  // namespace FV_NAMESPACE
