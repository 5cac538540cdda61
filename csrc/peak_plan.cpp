// peak_plan.cpp: which rows each stage of a batch computes, on the CPU.
#include "peak_plan.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace xrdfast {
namespace {

struct Segment {
    int64_t begin, end;
};
using Segments = std::vector<Segment>;  // of one pattern, in order, apart

// Appends a segment that begins no earlier than the last one, joined to it where at most `gap` positions lie between.
void append(Segments& segments, Segment next, int64_t gap) {
    if (next.begin >= next.end) return;
    if (!segments.empty() && next.begin - segments.back().end <= gap)
        segments.back().end = std::max(segments.back().end, next.end);
    else
        segments.push_back(next);
}

template <typename T>
Segments peaks_of(const T* intensity, int64_t length) {
    constexpr int64_t kStride = 16;  // positions looked at in one go
    Segments peaks;
    for (int64_t first = 0; first < length; first += kStride) {
        const int64_t last = std::min(length, first + kStride);
        int any = 0;
        for (int64_t i = first; i < last; ++i) any |= intensity[i] != T(0);
        for (int64_t i = first; any && i < last; ++i)
            if (intensity[i] != T(0)) append(peaks, {i, i + 1}, 0);
    }
    return peaks;
}

// Rows of one stage: pattern by pattern the segments between halos, then the blank pattern between halos; or dense.
struct Layout {
    bool packed;
    int64_t length, n_rows, blank;        // `blank`: row of the blank pattern's first position
    std::vector<Segments> computed;       // of each pattern
    std::vector<int64_t> first_row;       // of each pattern
};

// Finds rows of rising positions of one pattern.
class RowFinder {
   public:
    RowFinder(const Layout& layout, int64_t pattern)
        : layout_(layout),
          segment_(layout.computed[pattern].data()),
          end_(segment_ + layout.computed[pattern].size()),
          row_(layout.first_row[pattern] + 1) {}

    // The row with the value at a position, a blank one where the pattern has none of its own; -1 beyond the grid.
    int32_t at(int64_t position) {
        if (position < 0 || position >= layout_.length) return -1;
        for (; segment_ != end_ && segment_->end <= position; ++segment_) row_ += segment_->end - segment_->begin + 2;
        const bool own = segment_ != end_ && segment_->begin <= position;
        return static_cast<int32_t>(own ? row_ + position - segment_->begin : layout_.blank + position);
    }

   private:
    const Layout& layout_;
    const Segment *segment_, *end_;
    int64_t row_;  // of the segment's first position
};

Layout packed_layout(const std::vector<Segments>& felt, int64_t length, int64_t max_gap) {
    Layout layout{true, length, 0, 0, {}, {}};
    for (const Segments& pattern : felt) {
        layout.first_row.push_back(layout.n_rows);
        Segments joined;
        for (const Segment& s : pattern) append(joined, s, max_gap);
        for (const Segment& s : joined) layout.n_rows += s.end - s.begin + 2;
        layout.computed.push_back(std::move(joined));
    }
    layout.blank = layout.n_rows + 1;
    layout.n_rows += length + 2;
    return layout;
}

// Calls visit(pattern, position, row, is a halo) for every row of a packed layout; the blank pattern is the last.
template <typename Visit>
void for_each_row(const Layout& layout, Visit visit) {
    int64_t row = 0;
    const int64_t n_patterns = static_cast<int64_t>(layout.computed.size());
    const Segments whole{{0, layout.length}};
    for (int64_t pattern = 0; pattern <= n_patterns; ++pattern)
        for (const Segment& s : pattern < n_patterns ? layout.computed[pattern] : whole) {
            visit(pattern, s.begin - 1, row++, true);
            for (int64_t position = s.begin; position < s.end; ++position) visit(pattern, position, row++, false);
            visit(pattern, s.end, row++, true);
        }
}

template <typename T>
void describe_stage(const PeakPlanParams<T>& p, const Layout& layout, float* count, int32_t* halo) {
    std::vector<int64_t> lacking(layout.length + 1, 0);  // steps, then patterns without a row of their own
    for (const Segments& pattern : layout.computed)
        for (const Segment& s : pattern) {
            --lacking[s.begin];
            ++lacking[s.end];
        }
    int64_t running = p.n_patterns;
    for (int64_t& patterns : lacking) patterns = running += patterns;
    for_each_row(layout, [&](int64_t pattern, int64_t position, int64_t row, bool is_halo) {
        const bool inside = position >= 0 && position < layout.length;
        halo[row] = static_cast<int32_t>(!is_halo ? row : inside ? layout.blank + position : -1);
        count[row] = is_halo ? 0.0f : pattern < p.n_patterns ? 1.0f : static_cast<float>(lacking[position]);
    });
}

template <typename T>
void describe_input(const PeakPlanParams<T>& p, const Layout& layout) {
    int64_t blank = 0;  // some point that is zero: no pattern is touched everywhere, or this would be dense
    while (p.intensity[blank] != T(0)) ++blank;
    for_each_row(layout, [&](int64_t pattern, int64_t position, int64_t row, bool is_halo) {
        const bool inside = position >= 0 && position < p.length;
        p.position[row] = inside ? position : -1;
        p.point[row] = !inside ? 0 : is_halo || pattern == p.n_patterns ? blank : pattern * p.length + position;
    });
}

void describe_pool(const Layout& before, const Layout& after, int64_t n_patterns, int64_t padding, int32_t* pairs) {
    int32_t *first = pairs, *second = pairs + after.n_rows;
    if (!after.packed) {
        for (int64_t pattern = 0; pattern < n_patterns; ++pattern) {
            RowFinder finder(before, pattern);
            for (int64_t position = 0; position < after.length; ++position) {
                first[position * n_patterns + pattern] = finder.at(2 * position - padding);
                second[position * n_patterns + pattern] = finder.at(2 * position - padding + 1);
            }
        }
        return;
    }
    int64_t row = 0;
    const auto describe = [&](RowFinder& finder, int64_t position) {
        const bool inside = position >= 0 && position < after.length;
        first[row] = inside ? finder.at(2 * position - padding) : -1;
        second[row++] = inside ? finder.at(2 * position - padding + 1) : -1;
    };
    for (int64_t pattern = 0; pattern < n_patterns; ++pattern) {
        RowFinder finder(before, pattern);
        for (const Segment& s : after.computed[pattern])
            for (int64_t position = s.begin - 1; position <= s.end; ++position) describe(finder, position);
    }
    for (int64_t position = -1; position <= after.length; ++position, ++row) {
        for (int which = 0; which < 2; ++which) {
            const int64_t from = 2 * position - padding + which;
            const bool inside = position >= 0 && position < after.length && from >= 0 && from < before.length;
            (which ? second : first)[row] = static_cast<int32_t>(inside ? before.blank + from : -1);
        }
    }
}

}  // namespace

template <typename T>
void peak_plan_cpu(const PeakPlanParams<T>& p) {
    const int64_t room = p.n_patterns * p.length;
    std::vector<Segments> touched;
    for (int64_t i = 0; i < p.n_patterns; ++i) touched.push_back(peaks_of(p.intensity + i * p.length, p.length));
    std::fill_n(p.n_rows, p.packed_stages, 0);
    Layout before{};
    int64_t length = p.length;
    for (int64_t stage = 0; stage <= p.n_stages; ++stage) {
        const int64_t dense_rows = p.n_patterns * length;
        Layout layout{false, length, dense_rows, 0, {}, {}};
        if (stage < p.packed_stages) {
            std::vector<Segments> felt(touched.size());
            for (size_t i = 0; i < touched.size(); ++i)
                for (const Segment& s : touched[i])
                    append(felt[i], {std::max<int64_t>(0, s.begin - p.reach), std::min(length, s.end + p.reach)}, 0);
            Layout packed = packed_layout(felt, length, p.max_gap);
            if (static_cast<double>(packed.n_rows) < p.packed_share * static_cast<double>(dense_rows)) {
                layout = std::move(packed);
                touched = std::move(felt);
            }
        }
        if (stage > 0)
            describe_pool(before, layout, p.n_patterns, p.paddings[stage - 1], p.pairs + 2 * (stage - 1) * room);
        if (!layout.packed) return;
        p.n_rows[stage] = layout.n_rows;
        describe_stage(p, layout, p.count + stage * room, p.halo + stage * room);
        if (stage == 0) describe_input(p, layout);
        const int64_t padding = p.paddings[stage], next = (length + 2 * padding) / 2;
        for (Segments& pattern : touched) {
            Segments pooled;
            for (const Segment& s : pattern)
                append(pooled, {(s.begin + padding) / 2, std::min(next, (s.end - 1 + padding) / 2 + 1)}, 0);
            pattern = std::move(pooled);
        }
        before = std::move(layout);
        length = next;
    }
}

template void peak_plan_cpu(const PeakPlanParams<float>&);
template void peak_plan_cpu(const PeakPlanParams<double>&);

}  // namespace xrdfast
