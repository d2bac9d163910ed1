// Chooses the instruction set at run time and spreads tasks over threads. Portable code only.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "foveate_cpu.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

#define FV_DECLARE(name)                                             \
    namespace name {                                                 \
    void run(int, const fv_job&, int64_t, int64_t, float*);          \
    int64_t workspace_floats();                                      \
    void scan(int, const fv_scan&, int64_t, float*);                 \
    int64_t scan_floats(int, const fv_scan&);                        \
    }
FV_DECLARE(fv_portable)
// The build defines FV_HAVE_<LEVEL> for each unit that it compiled.
#if defined(FV_HAVE_AVX2)
FV_DECLARE(fv_avx2)
#endif
#if defined(FV_HAVE_AVX512)
FV_DECLARE(fv_avx512)
#endif
#if defined(FV_HAVE_AVX512BF16)
FV_DECLARE(fv_avx512bf16)
#endif

#if defined(FV_HAVE_AMX)
FV_DECLARE(fv_amx)
#if !defined(FV_AMX_EMULATED)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#endif

namespace {

// The functions of one level.
struct Level {
    void (*run)(int, const fv_job&, int64_t, int64_t, float*);
    void (*scan)(int, const fv_scan&, int64_t, float*);
    int64_t (*scan_floats)(int, const fv_scan&);
};
#define FV_LEVEL(name) \
    Level { name::run, name::scan, name::scan_floats }

Level choose(int isa) {
#if defined(FV_HAVE_AMX)
    if (isa == FV_AMX_BF16) return FV_LEVEL(fv_amx);
#endif
#if defined(FV_HAVE_AVX512BF16)
    if (isa == FV_AVX512_BF16) return FV_LEVEL(fv_avx512bf16);
#endif
#if defined(FV_HAVE_AVX512)
    if (isa == FV_AVX512) return FV_LEVEL(fv_avx512);
#endif
#if defined(FV_HAVE_AVX2)
    if (isa == FV_AVX2) return FV_LEVEL(fv_avx2);
#endif
    (void)isa;
    return FV_LEVEL(fv_portable);
}

// Tasks are taken one by one by whoever is free; which thread does one changes no number.
template <class Job>
struct Work {
    Level level;
    int kind;
    const Job* job;
    int64_t tasks, floats;
    float* memory;
    std::atomic<int64_t> next{0};
    std::atomic<int> threads{0};
};

void one(const Work<fv_job>& w, int64_t task, float* memory) { w.level.run(w.kind, *w.job, task, task + 1, memory); }
void one(const Work<fv_scan>& w, int64_t task, float* memory) { w.level.scan(w.kind, *w.job, task, memory); }

template <class Job>
void work(void* data) {
    auto& w = *static_cast<Work<Job>*>(data);
    float* memory = w.memory + w.floats * w.threads.fetch_add(1);
    for (int64_t t; (t = w.next.fetch_add(1)) < w.tasks;) one(w, t, memory);
}

template <class Job>
int launch(Work<Job>& w) {
    if (w.tasks == 0) return 0;
    const int n_threads = static_cast<int>(std::min<int64_t>(w.job->threads > 0 ? w.job->threads : 1, w.tasks));
    w.floats = (w.floats + 15) / 16 * 16;
    w.memory = static_cast<float*>(std::aligned_alloc(64, w.floats * 4 * n_threads));
    if (!w.memory) return 3;
#if defined(FV_POISON)
    std::memset(w.memory, 0xff, w.floats * 4 * n_threads);  // NaN: what is read before it is written shows
#endif
    if (w.job->parallel && n_threads > 1) {
        w.job->parallel(work<Job>, &w, static_cast<unsigned>(n_threads), 0);
    } else {
        std::vector<std::thread> pool;
        for (int id = 1; id < n_threads; ++id) {
            try {
                pool.emplace_back(work<Job>, &w);
            } catch (...) {
                break;  // fewer threads than asked for: the others take the tasks
            }
        }
        work<Job>(&w);
        for (auto& thread : pool) thread.join();
    }
    std::free(w.memory);
    return 0;
}

int attend(int kind, const fv_job* job) {
    if (job->abi != FV_ABI) return 1;
    if (job->isa > fv_best_isa()) return 2;
    const int64_t heads = kind == 2 ? job->kv_heads : job->heads;
    Work<fv_job> w{choose(job->isa), kind, job, job->batch * heads * job->slices, fv_portable::workspace_floats(), nullptr};
    return launch(w);
}

// Asks for large pages where a long result is about to be written. Fresh memory in small pages takes longer to come by
// than a scan takes to fill it. From this size on, malloc gives every result pages of its own.
void large_pages(float* to, int64_t floats) {
#if defined(MADV_HUGEPAGE)
    if (!to || floats < (32 << 20) / 4) return;
    const uintptr_t page = 4096, begin = (reinterpret_cast<uintptr_t>(to) + page - 1) / page * page;
    const uintptr_t end = reinterpret_cast<uintptr_t>(to + floats) / page * page;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: nothing depends on the answer
#else
    (void)to, (void)floats;
#endif
}

int scan(int backward, const fv_scan* job) {
    if (job->abi != FV_ABI) return 1;
    if (job->isa > fv_best_isa()) return 2;
    const int64_t rows = job->batch * job->heads * job->n;
    if (backward) {
        large_pages(job->d_q, job->parts * rows * job->dim);
        large_pages(job->d_k, job->parts * rows * job->dim);
        large_pages(job->d_v, rows * job->dim_v);
        large_pages(job->d_decay, job->parts * rows * (job->channels ? job->dim : 1));
    } else {
        large_pages(job->out, rows * job->dim_v);
    }
    const Level level = choose(job->isa);
    const int64_t tasks = job->n > 0 ? job->batch * job->heads * job->parts : 0;
    Work<fv_scan> w{level, backward, job, tasks, level.scan_floats(backward, *job), nullptr};
    return launch(w);
}

#if defined(FV_HAVE_AMX)
// Whether tiles may be used: the CPU has them, and the kernel lets this process keep their 8 KB of state (asked once).
bool may_use_tiles() {
#if defined(FV_AMX_EMULATED)
    return true;
#elif defined(__linux__)
    static const bool may = [] {
        unsigned a = 0, b = 0, c = 0, d = 0;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 22 & 1)) return false;
        const long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    }();
    return may;
#else
    return false;  // elsewhere nobody is known to be asked
#endif
}
#endif

}  // namespace

int fv_best_isa(void) {
#if defined(FV_HAVE_AVX512) || defined(FV_HAVE_AVX2)
    __builtin_cpu_init();
#endif
#if defined(FV_HAVE_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
#if defined(FV_HAVE_AVX512BF16)
        if (__builtin_cpu_supports("avx512bf16")) {
#if defined(FV_HAVE_AMX)
            if (may_use_tiles()) return FV_AMX_BF16;
#endif
            return FV_AVX512_BF16;
        }
#endif
        return FV_AVX512;
    }
#endif
#if defined(FV_HAVE_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return FV_AVX2;
#endif
    return FV_PORTABLE;
}

int fv_forward(const fv_job* job) { return attend(0, job); }
int fv_backward_query(const fv_job* job) { return attend(1, job); }
int fv_backward_key(const fv_job* job) { return attend(2, job); }
int fv_scan_forward(const fv_scan* job) { return scan(0, job); }
int fv_scan_backward(const fv_scan* job) { return scan(1, job); }
