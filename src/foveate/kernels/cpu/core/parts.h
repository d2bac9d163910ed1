// Flattened cells while they are being made, one part for every set, and how sets are spread over threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "foveate_cpu.h"

namespace fv {

constexpr int LANES = 64;

inline uint64_t low_bits(int64_t n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }

struct Part {
    std::vector<int32_t> own, runs;
    std::vector<int64_t> own_count, run_count, mask_at;  // mask_at: position in `words`, -1: none
    std::vector<uint64_t> words;
    bool wrong = false;   // an id was out of range
    bool single = true;   // no row is owned twice
};

// Rows in no cell get cells without other rows: their results are then written (as zeros) by whoever runs the cells.
inline void own_the_rest(Part& part, const std::vector<uint8_t>& owned) {
    int64_t n = 0;
    for (size_t id = 0; id < owned.size(); ++id) {
        if (owned[id]) continue;
        if (n++ % LANES == 0) {
            part.own_count.push_back(0);
            part.run_count.push_back(0);
            part.mask_at.push_back(-1);
        }
        part.own.push_back((int32_t)id);
        ++part.own_count.back();
    }
}

// Appends rows one by one to the runs of the last cell.
struct Runs {
    Part& part;
    int64_t count = 0;
    int64_t next = -1;
    void add(int64_t id) {
        if (id == next) {
            ++part.runs.back();
        } else {
            part.runs.push_back((int32_t)id);
            part.runs.push_back(1);
            ++count;
        }
        next = id + 1;
    }
};

template <class F>
bool for_each_set(int64_t sets, int32_t threads, F make) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    auto work = [&] {
        try {
            for (int64_t s; (s = next.fetch_add(1)) < sets;) make(s);
        } catch (...) {
            failed = true;  // out of memory
        }
    };
    std::vector<std::thread> pool;
    for (int64_t id = 1; id < std::min<int64_t>(threads, sets); ++id) {
        try {
            pool.emplace_back(work);
        } catch (...) {
            break;
        }
    }
    work();
    for (auto& thread : pool) thread.join();
    return !failed;
}

}  // namespace fv

struct fv_flat {
    std::vector<fv::Part> parts;
};

namespace fv {

inline void count(const fv_flat& made, int64_t* sizes) {
    std::fill(sizes, sizes + 6, 0);
    sizes[5] = 1;
    for (const Part& p : made.parts) {
        sizes[0] += (int64_t)p.own_count.size();
        sizes[1] += (int64_t)p.own.size();
        sizes[2] += (int64_t)p.runs.size() / 2;
        sizes[3] += (int64_t)p.words.size();
        sizes[4] |= p.wrong;
        sizes[5] &= p.single;
    }
}

}  // namespace fv
