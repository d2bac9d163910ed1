// Cells that list their ids -> flat cells. Routed cells are new in every call, so this has to be quick. Portable code.
#include "parts.h"

namespace {

using fv::LANES;
using fv::Part;

// One cell: present own rows in pieces of 64, other rows that at least one of a piece's rows sees.
struct Cell {
    const fv_ids& ids;
    const int64_t *own, *other;
    const uint8_t* mask;
    Part& out;
    std::vector<int32_t>& slots;    // scratch: which slots hold an own row
    std::vector<uint64_t>& words;   // scratch: for every column the rows of the piece that see it
    std::vector<uint8_t>& owned;    // per own row of the set: whether it was seen before

    void run(int64_t n_own, int64_t n_other) {
        slots.clear();
        for (int64_t i = 0; i < ids.n_own; ++i) {
            int64_t id = own[i * ids.own_stride[3]];
            out.wrong |= id < -1 || id >= n_own;
            if (id >= 0) slots.push_back((int32_t)i);
        }
        for (int64_t j = 0; j < ids.n_other; ++j) {
            int64_t id = other[j * ids.other_stride[3]];
            out.wrong |= id < -1 || id >= n_other;
        }
        if (out.wrong) return;
        for (size_t at = 0; at < slots.size(); at += LANES) piece(slots.data() + at, std::min(LANES, (int)(slots.size() - at)));
    }

    void piece(const int32_t* slot, int n) {
        for (int i = 0; i < n; ++i) {
            int64_t id = own[slot[i] * ids.own_stride[3]];
            out.single &= !owned[id];
            owned[id] = 1;
            out.own.push_back((int32_t)id);
        }
        const uint64_t all = fv::low_bits(n);
        words.assign(ids.n_other, mask ? 0 : all);
        if (mask)
            for (int i = 0; i < n; ++i) {
                const uint8_t* row = mask + slot[i] * ids.mask_stride[3];
                for (int64_t j = 0; j < ids.n_other; ++j)
                    words[j] |= (uint64_t)(row[j * ids.mask_stride[4]] != 0) << i;
            }
        bool full = true;
        fv::Runs runs{out};
        size_t kept = 0;
        for (int64_t j = 0; j < ids.n_other; ++j) {
            int64_t id = other[j * ids.other_stride[3]];
            if (id < 0 || !words[j]) continue;
            full &= words[j] == all;
            words[kept++] = words[j];
            runs.add(id);
        }
        out.own_count.push_back(n);
        out.run_count.push_back(runs.count);
        out.mask_at.push_back(full ? -1 : store(kept));
    }

    // Cells often share one mask: the words of the cell before are used again where they are equal.
    int64_t store(size_t kept) {
        std::vector<uint64_t>& made = out.words;
        if (made.size() >= kept && kept && std::equal(words.begin(), words.begin() + kept, made.end() - kept))
            return (int64_t)(made.size() - kept);
        made.insert(made.end(), words.begin(), words.begin() + kept);
        return (int64_t)(made.size() - kept);
    }
};

void flatten_set(const fv_ids* groups, int64_t n_groups, int64_t b, int64_t h, int64_t n_own, int64_t n_other, Part& out) {
    std::vector<int32_t> slots;
    std::vector<uint64_t> words;
    std::vector<uint8_t> owned(n_own);
    for (int64_t g = 0; g < n_groups; ++g) {
        const fv_ids& ids = groups[g];
        for (int64_t c = 0; c < ids.cells; ++c) {
            const int64_t* own = ids.own + b * ids.own_stride[0] + h * ids.own_stride[1] + c * ids.own_stride[2];
            const int64_t* other = ids.other + b * ids.other_stride[0] + h * ids.other_stride[1] + c * ids.other_stride[2];
            const uint8_t* mask = ids.mask;
            if (mask) mask += b * ids.mask_stride[0] + h * ids.mask_stride[1] + c * ids.mask_stride[2];
            Cell{ids, own, other, mask, out, slots, words, owned}.run(n_own, n_other);
            if (out.wrong) return;
        }
    }
    fv::own_the_rest(out, owned);
}

template <class T>
T* put(T* to, const std::vector<T>& from) {
    if (!from.empty()) std::memcpy(to, from.data(), from.size() * sizeof(T));
    return to + from.size();
}

}  // namespace

fv_flat* fv_flatten(const fv_ids* groups, int64_t n_groups, int64_t lead_b, int64_t lead_h, int64_t n_own, int64_t n_other,
                    int32_t threads, int64_t* sizes) try {
    auto* made = new fv_flat{std::vector<Part>(lead_b * lead_h)};
    bool ok = fv::for_each_set(lead_b * lead_h, threads, [&](int64_t s) {
        flatten_set(groups, n_groups, s / lead_h, s % lead_h, n_own, n_other, made->parts[s]);
    });
    if (ok) fv::count(*made, sizes);
    if (ok && !sizes[4]) return made;
    delete made;
    return nullptr;
} catch (...) {
    return nullptr;
}

void fv_flat_take(fv_flat* made, int64_t* set_ptr, int64_t* own_ptr, int32_t* own, int64_t* run_ptr, int32_t* runs,
                  int64_t* mask_ptr, uint64_t* masks) {
    int64_t cell = 0, words = 0;
    *set_ptr++ = 0, *own_ptr = 0, *run_ptr = 0;
    for (const Part& p : made->parts) {
        for (size_t c = 0; c < p.own_count.size(); ++c, ++cell) {
            own_ptr[cell + 1] = own_ptr[cell] + p.own_count[c];
            run_ptr[cell + 1] = run_ptr[cell] + p.run_count[c];
            mask_ptr[cell] = p.mask_at[c] < 0 ? -1 : 8 * (words + p.mask_at[c]);
        }
        *set_ptr++ = cell;
        words += (int64_t)p.words.size();
        own = put(own, p.own), runs = put(runs, p.runs), masks = put(masks, p.words);
    }
    delete made;
}
