// Own and other rows of flattened cells exchanged: what the gradients of keys and values run on. Routed cells are new
// in every call, so this has to be quick. Portable code only.
//
// Rows that stand in the same cells are put together, up to 64 in a new cell: routed regions and clusters then need
// no masks. A new cell's other rows are the own rows of every old cell that one of its rows stands in.
#include "parts.h"

namespace {

using fv::LANES;
using fv::Part;

// Families of at least this many rows get cells of their own; smaller ones share.
constexpr int ALONE = 16;

struct Entry {  // a row stands in column `column` of cell `cell`; repeats in one cell count as further cells
    int32_t cell, column;
};

uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

class Transposer {
   public:
    Transposer(const fv_cells& cells, int64_t first, int64_t last, int64_t n_other, Part& out)
        : cells_(cells), first_(first), n_cells_(last - first), n_other_(n_other), out_(out) {}

    void run() {
        list_entries();
        std::vector<int32_t> order, family;
        put_families_together(order, family);
        std::vector<int32_t> size(family.empty() ? 0 : 1 + *std::max_element(family.begin(), family.end()));
        for (int32_t key : order) ++size[family[key]];
        slot_.assign(n_cells_ * repeats_, -1);
        for (size_t at = 0; at < order.size();) {
            size_t end = at + 1;
            while (end < order.size() && end - at < LANES) {
                int32_t before = family[order[end - 1]], here = family[order[end]];
                if (before != here && (size[before] >= ALONE || size[here] >= ALONE)) break;
                ++end;
            }
            write(order.data() + at, (int)(end - at));
            at = end;
        }
        std::vector<uint8_t> owned(n_other_);
        for (int64_t id = 0; id < n_other_; ++id) owned[id] = entry_ptr_[id] < entry_ptr_[id + 1];
        fv::own_the_rest(out_, owned);
    }

   private:
    // entry_ptr_, entries_: for every other row the cells it stands in, by rising cell.
    void list_entries() {
        entry_ptr_.assign(n_other_ + 1, 0);
        each([&](int32_t, int32_t, int32_t id) { ++entry_ptr_[id + 1]; });
        for (int64_t i = 0; i < n_other_; ++i) entry_ptr_[i + 1] += entry_ptr_[i];
        entries_.resize(entry_ptr_[n_other_]);
        std::vector<int64_t> at(entry_ptr_.begin(), entry_ptr_.end() - 1);
        each([&](int32_t cell, int32_t column, int32_t id) { entries_[at[id]++] = {cell, column}; });
        for (int64_t id = 0; id < n_other_; ++id) {
            int32_t base = -1, repeat = 0;
            for (int64_t e = entry_ptr_[id]; e < entry_ptr_[id + 1]; ++e) {
                repeat = entries_[e].cell == base ? repeat + 1 : 0;
                base = entries_[e].cell;
                entries_[e].cell += repeat * (int32_t)n_cells_;
                if (repeat >= repeats_) repeats_ = repeat + 1;
            }
        }
    }

    template <class F>
    void each(F f) const {
        for (int64_t c = 0; c < n_cells_; ++c) {
            int32_t column = 0;
            for (int64_t r = cells_.run_ptr[first_ + c]; r < cells_.run_ptr[first_ + c + 1]; ++r)
                for (int32_t i = 0; i < cells_.runs[2 * r + 1]; ++i) f((int32_t)c, column++, cells_.runs[2 * r] + i);
        }
    }

    // Families in the order of their first row. A collision of hashes only costs masked rows.
    void put_families_together(std::vector<int32_t>& order, std::vector<int32_t>& family) const {
        family.assign(n_other_, -1);
        size_t room = 16;
        while (room < 2 * (size_t)n_other_) room *= 2;
        std::vector<uint64_t> seen(room);
        std::vector<int32_t> number(room, -1);
        std::vector<int64_t> start(1, 0);
        for (int64_t id = 0; id < n_other_; ++id) {
            if (entry_ptr_[id] == entry_ptr_[id + 1]) continue;
            uint64_t hash = 0;
            for (int64_t e = entry_ptr_[id]; e < entry_ptr_[id + 1]; ++e) hash += mix((uint64_t)entries_[e].cell);
            size_t at = (size_t)mix(hash) & (room - 1);
            while (number[at] >= 0 && seen[at] != hash) at = (at + 1) & (room - 1);
            if (number[at] < 0) {
                number[at] = (int32_t)start.size() - 1, seen[at] = hash;
                start.push_back(0);
            }
            family[id] = number[at];
            ++start[number[at] + 1];
        }
        for (size_t f = 1; f < start.size(); ++f) start[f] += start[f - 1];
        order.resize(start.back());
        for (int64_t id = 0; id < n_other_; ++id)
            if (family[id] >= 0) order[start[family[id]]++] = (int32_t)id;
    }

    void write(const int32_t* keys, int n) {
        touched_.clear();
        bool full = true;
        for (int i = 0; i < n; ++i)
            for (int64_t e = entry_ptr_[keys[i]]; e < entry_ptr_[keys[i] + 1]; ++e) {
                int32_t cell = entries_[e].cell;
                if (slot_[cell] < 0) slot_[cell] = 0, touched_.push_back(cell);
                ++slot_[cell];  // for now: how many of the rows stand in it
                full &= cells_.mask_ptr[first_ + cell % n_cells_] < 0;
            }
        std::sort(touched_.begin(), touched_.end());
        int64_t total = 0;
        for (int32_t cell : touched_) {
            full &= slot_[cell] == n;
            slot_[cell] = total;
            int64_t c = first_ + cell % n_cells_;
            total += cells_.own_ptr[c + 1] - cells_.own_ptr[c];
        }
        if (!full) full = fill(keys, n, total);
        out_.own.insert(out_.own.end(), keys, keys + n);
        out_.own_count.push_back(n);
        out_.mask_at.push_back(full ? -1 : (int64_t)out_.words.size());
        int64_t row = 0;
        fv::Runs runs{out_};
        for (int32_t cell : touched_) {
            int64_t c = first_ + cell % n_cells_;
            for (int64_t o = cells_.own_ptr[c]; o < cells_.own_ptr[c + 1]; ++o, ++row) {
                if (!full) {
                    if (!bits_[row]) continue;
                    out_.words.push_back(bits_[row]);
                }
                runs.add(cells_.own[o]);
            }
            slot_[cell] = -1;
        }
        out_.run_count.push_back(runs.count);
    }

    // bits_: for every own row of the touched cells, which of the n keys it sees. True when all see all.
    bool fill(const int32_t* keys, int n, int64_t total) {
        bits_.assign(total, 0);
        for (int i = 0; i < n; ++i) {
            uint64_t bit = 1ull << i;
            for (int64_t e = entry_ptr_[keys[i]]; e < entry_ptr_[keys[i] + 1]; ++e) {
                int64_t c = first_ + entries_[e].cell % n_cells_, used = cells_.own_ptr[c + 1] - cells_.own_ptr[c];
                uint64_t* to = bits_.data() + slot_[entries_[e].cell];
                if (cells_.mask_ptr[c] < 0) {
                    for (int64_t q = 0; q < used; ++q) to[q] |= bit;
                } else {
                    uint64_t seen;
                    std::memcpy(&seen, cells_.masks + cells_.mask_ptr[c] + 8 * (int64_t)entries_[e].column, 8);
                    for (int64_t q = 0; q < used; ++q) to[q] |= (seen >> q & 1) << i;
                }
            }
        }
        uint64_t all = fv::low_bits(n);
        for (uint64_t word : bits_)
            if (word != all) return false;
        return true;
    }

    const fv_cells& cells_;
    int64_t first_, n_cells_, n_other_;
    int32_t repeats_ = 1;
    Part& out_;
    std::vector<int64_t> entry_ptr_, slot_;
    std::vector<Entry> entries_;
    std::vector<int32_t> touched_;
    std::vector<uint64_t> bits_;
};

}  // namespace

fv_flat* fv_transpose(const fv_cells* cells, int64_t sets, int64_t n_other, int32_t threads, int64_t* sizes) try {
    auto* made = new fv_flat{std::vector<Part>(sets)};
    bool ok = fv::for_each_set(sets, threads, [&](int64_t s) {
        Transposer(*cells, cells->set_ptr[s], cells->set_ptr[s + 1], n_other, made->parts[s]).run();
    });
    if (ok) {
        fv::count(*made, sizes);
        return made;
    }
    delete made;
    return nullptr;
} catch (...) {
    return nullptr;
}
