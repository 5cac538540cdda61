// drive_rows.cpp: plans, convolutions and norms over lists of rows, against lists and sums written out.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "drive.h"
#include "peak_conv.h"
#include "peak_norm.h"
#include "peak_plan.h"

using namespace xrdfast;

namespace {

std::vector<double> draw(std::mt19937& random, int64_t n) {
    std::uniform_real_distribution<double> number(-1.0, 1.0);
    std::vector<double> x(n);
    for (double& value : x) value = number(random);
    return x;
}

// Norm, residual, activation and pool of rows, forward and backward, against sums written out.
void check_norm(int64_t n_rows, int64_t n_channels, bool maximum, bool batch) {
    std::mt19937 random(9);
    const auto draw = [&](int64_t n) { return ::draw(random, n); };
    // Pairs of rows make a row; the last of them is blank: it is taken with -1, and by three more rows.
    const int64_t n_touched = n_rows - 1, n_out = n_touched / 2 + 3;
    std::vector<int32_t> take(2 * n_out, static_cast<int32_t>(n_rows - 1));
    for (int64_t j = 0; j < n_touched / 2; ++j) take[j] = static_cast<int32_t>(2 * j), take[n_out + j] = take[j] + 1;
    take[n_out + n_touched / 2] = -1;
    std::vector<float> count(n_rows, 1.0f);
    count[0] = 0.0f, count[n_rows - 1] = 5.0f;
    const double total = static_cast<double>(n_rows + 3), eps = 1e-5;
    const std::vector<double> h = draw(n_rows * n_channels), residual = draw(n_rows * n_channels);
    const std::vector<double> gamma = draw(n_channels), beta = draw(n_channels), grad_out = draw(n_out * n_channels);
    std::vector<double> mean(n_channels, 0.3), var(n_channels, 0.7), out(n_out * n_channels);
    std::vector<double> grad_h(h.size()), grad_z(h.size()), grad_gamma(n_channels), grad_beta(n_channels);
    std::vector<double> sums(2 * kNormParts * n_channels), weights(kNormParts);
    std::vector<int32_t> taker, taken(n_rows + 1, 0);
    for (int32_t r = 0; r < n_rows; ++r) {
        taken[r] = static_cast<int32_t>(taker.size());
        for (int32_t place = 0; place < 2 * n_out; ++place)
            if (take[place] == r) taker.push_back(place);
    }
    taken[n_rows] = static_cast<int32_t>(taker.size());
    const PeakNormParams<double> p{h.data(),    residual.data(), gamma.data(), beta.data(), count.data(), take.data(),
                                   mean.data(), var.data(),      n_rows,       n_out,       n_channels,   n_touched,
                                   2,           maximum,         batch,        eps,         total};
    const PeakNormScratch<double> scratch{sums.data(), weights.data(), taker.data(), taken.data()};
    expect(peak_norm_cuda(p, scratch, out.data(), nullptr) == 0, "peak_norm", 1, 0);
    const PeakNormGrads<double> grads{grad_out.data(), grad_h.data(), grad_z.data(), grad_gamma.data(),
                                      grad_beta.data()};
    expect(peak_norm_backward_cuda(p, scratch, grads, nullptr) == 0, "peak_norm_backward", 1, 0);
    for (int64_t c = 0; c < n_channels; ++c) {
        const auto at = [&](int64_t r) { return r * n_channels + c; };
        double m = mean[c], v = var[c];
        if (batch) {
            m = v = 0.0;
            for (int64_t r = 0; r < n_rows; ++r) m += count[r] * h[at(r)] / total;
            for (int64_t r = 0; r < n_rows; ++r) v += count[r] * (h[at(r)] - m) * (h[at(r)] - m) / total;
            expect_close(mean[c], m, 1.0, "mean");
            expect_close(var[c], v, 1.0, "variance");
        }
        const double rstd = 1.0 / std::sqrt(v + eps);
        const auto z = [&](int64_t r) { return (h[at(r)] - m) * rstd * gamma[c] + beta[c] + residual[at(r)]; };
        const auto y = [&](int64_t r) { return r < 0 ? 0.0 : z(r) > 0.0 ? z(r) : kNegativeSlope * z(r); };
        std::vector<double> want(n_rows, 0.0);
        for (int64_t j = 0; j < n_out; ++j) {
            const int64_t a = take[j], b = take[n_out + j];
            expect_close(out[at(j)], maximum ? std::max(y(a), y(b)) : 0.5 * (y(a) + y(b)), 1.0, "normed");
            const double g = grad_out[at(j)];
            const bool second = y(b) > y(a);
            if (a >= 0) want[a] += maximum ? (second ? 0.0 : g) : 0.5 * g;
            if (b >= 0) want[b] += maximum ? (second ? g : 0.0) : 0.5 * g;
        }
        double plain = 0.0, scaled = 0.0;
        for (int64_t r = 0; r < n_rows; ++r) {
            want[r] *= z(r) > 0.0 ? 1.0 : kNegativeSlope;
            expect_close(grad_z[at(r)], want[r], 1.0, "gradient of the argument");
            plain += want[r];
            scaled += want[r] * (h[at(r)] - m) * rstd;
        }
        expect_close(grad_beta[c], plain, 10.0, "gradient of beta");
        expect_close(grad_gamma[c], scaled, 10.0, "gradient of gamma");
        for (int64_t r = 0; r < n_rows; ++r) {
            const double common = batch ? (plain + (h[at(r)] - m) * rstd * scaled) / total : 0.0;
            const double g = gamma[c] * rstd * (want[r] - count[r] * common);
            expect_close(grad_h[at(r)], g, 10.0, "gradient of h");
        }
    }
}

// A row of a list: a position of a pattern, or of the blank one, which comes after the others; a halo is no row's own.
struct ListedRow {
    int64_t pattern, position;
    bool is_halo;
};

// The rows of one stage, by the rule: every pattern's positions within reach of a peak, gaps of two closed, halos beside.
struct ListedStage {
    std::vector<std::vector<char>> felt, computed;
    std::vector<ListedRow> rows;
    int64_t length;

    ListedStage(const std::vector<std::vector<char>>& touched, int64_t n, int64_t reach) : length(n) {
        for (const std::vector<char>& peaks : touched) {
            std::vector<char> near(n, 0), own;
            for (int64_t i = 0; i < n; ++i)
                for (int64_t k = std::max<int64_t>(0, i - reach); k <= std::min(n - 1, i + reach); ++k)
                    near[i] |= peaks[k];
            own = near;
            for (int64_t i = 0; i < n; ++i)
                for (int64_t end = i + 2; near[i] && end <= std::min(n - 1, i + 3); ++end)
                    if (near[end]) std::fill(own.begin() + i, own.begin() + end, static_cast<char>(1));
            felt.push_back(near);
            computed.push_back(own);
        }
        const int64_t n_patterns = static_cast<int64_t>(touched.size());
        for (int64_t p = 0; p <= n_patterns; ++p) {
            const auto has = [&](int64_t i) { return i >= 0 && i < n && (p == n_patterns || computed[p][i]); };
            for (int64_t i = -1; i <= n; ++i)
                if (has(i - 1) || has(i) || has(i + 1)) rows.push_back({p, i, !has(i)});
        }
    }
    int64_t row_with(int64_t pattern, int64_t position) const {
        if (position < 0 || position >= length) return -1;
        const bool own = pattern < static_cast<int64_t>(computed.size()) && computed[pattern][position];
        const int64_t holder = own ? pattern : static_cast<int64_t>(computed.size());
        for (size_t r = 0; r < rows.size(); ++r)
            if (rows[r].pattern == holder && rows[r].position == position && !rows[r].is_halo)
                return static_cast<int64_t>(r);
        return -2;
    }
};

// `spare`: rows of room beyond those needed; negative: too little, and nothing may be written.
template <typename T>
void check_plan(int64_t n_patterns, int64_t length, int64_t spare) {
    constexpr int64_t kStages = 2;
    const int64_t padding[kStages] = {0, 1}, lengths[] = {length, length / 2, (length / 2 + 2) / 2};
    std::vector<T> intensity(n_patterns * length, T(0));
    std::vector<std::vector<char>> touched(n_patterns, std::vector<char>(length, 0));
    for (int64_t p = 1; p < n_patterns; ++p)  // the first is blank
        for (const int64_t i : {(7 * p) % length, (7 * p + 5 + p) % length, length - 1})
            intensity[p * length + i] = T(1), touched[p][i] = 1;
    std::vector<ListedStage> want;
    for (int64_t s = 0; s < kStages; ++s) {
        want.emplace_back(touched, lengths[s], 2);
        for (int64_t p = 0; p < n_patterns; ++p) {
            touched[p].assign(lengths[s + 1], 0);
            for (int64_t i = 0; i < 2 * lengths[s + 1]; ++i) {
                const int64_t from = i - padding[s];
                if (from >= 0 && from < lengths[s]) touched[p][i / 2] |= want[s].felt[p][from];
            }
        }
    }
    const int64_t n_points = n_patterns * (lengths[0] + lengths[1]), n_dense = n_patterns * lengths[2];
    const int64_t needed[] = {static_cast<int64_t>(want[0].rows.size()), static_cast<int64_t>(want[1].rows.size())};
    const int64_t room[] = {needed[0] + spare, needed[1] + spare};
    std::vector<uint8_t> felt(n_points), computed(n_points);
    std::vector<int64_t> first_row(kStages * (n_patterns + 1)), n_rows(kStages), blank(n_patterns + 1);
    const PeakCountParams<T> p{intensity.data(), n_patterns, length, kStages, {padding[0], padding[1]}, 2, 2,
                               felt.data(), computed.data(), first_row.data(), n_rows.data(), blank.data()};
    expect(peak_count_cuda(p, nullptr) == 0, "peak_count", 1, 0);
    std::vector<int64_t> point(room[0], -5), position(room[0], -5);
    std::vector<float> count(room[0] + room[1], -5.0f);
    std::vector<int32_t> halo(room[0] + room[1], -5), pairs(2 * (room[1] + n_dense), -5), row_at(n_points);
    char overflow = 5;
    const PeakListParams lists{{room[0], room[1], n_dense}, reinterpret_cast<bool*>(&overflow), point.data(),
                               position.data(), count.data(), halo.data(), pairs.data(), row_at.data()};
    expect(peak_list_cuda(p, lists, nullptr) == 0, "peak_list", 1, 0);
    expect(overflow == (spare < 0), "overflow", overflow, spare < 0);
    if (spare < 0) {
        for (const int32_t r : pairs) expect(r == -5, "row without room", r, -5);
        return;
    }
    int64_t before = 0;
    for (int64_t s = 0; s < kStages; ++s) {
        expect(n_rows[s] == needed[s], "rows", static_cast<double>(n_rows[s]), static_cast<double>(needed[s]));
        for (int64_t r = 0; r < needed[s]; ++r) {
            const auto [pattern, i, is_halo] = want[s].rows[r];
            const int64_t holder = is_halo ? want[s].row_with(n_patterns, i) : r;
            expect(halo[before + r] == holder, "halo", halo[before + r], static_cast<double>(holder));
            float samples = is_halo ? 0.0f : pattern < n_patterns ? 1.0f : static_cast<float>(n_patterns);
            for (int64_t q = 0; pattern == n_patterns && !is_halo && q < n_patterns; ++q)
                samples -= want[s].computed[q][i] ? 1.0f : 0.0f;
            expect(count[before + r] == samples, "samples", count[before + r], samples);
            const bool is_inside = i >= 0 && i < lengths[s];
            if (s > 0) {
                for (int64_t k = 0; k < 2; ++k) {
                    const int64_t from = is_inside ? want[s - 1].row_with(pattern, 2 * i - padding[s - 1] + k) : -1;
                    expect(pairs[k * room[s] + r] == from, "pair", pairs[k * room[s] + r], static_cast<double>(from));
                }
                continue;
            }
            expect(position[r] == (is_inside ? i : -1), "position", static_cast<double>(position[r]), 1.0 * i);
            const T value = intensity[point[r]];
            const T own = is_inside && !is_halo && pattern < n_patterns ? intensity[pattern * length + i] : T(0);
            expect(!is_inside || value == own, "point", static_cast<double>(value), static_cast<double>(own));
        }
        for (int64_t r = needed[s]; r < room[s]; ++r) expect(halo[before + r] == -5, "row left over", halo[r], -5);
        before += room[s];
    }
    for (int64_t j = 0; j < n_dense; ++j)
        for (int64_t k = 0; k < 2; ++k) {
            const int64_t from = want[1].row_with(j % n_patterns, 2 * (j / n_patterns) - padding[1] + k);
            const int32_t got = pairs[2 * room[1] + k * n_dense + j];
            expect(got == from, "pair of a dense row", got, static_cast<double>(from));
        }
}

// out[r] = x[r - shift] W[0] + x[r] W[1] + x[r + shift] W[2], and the gradient of the weights in `n_parts` parts.
void check_conv(int64_t n_rows, int64_t n_in, int64_t n_out, int64_t shift, int64_t n_parts) {
    std::mt19937 random(11);
    const std::vector<double> x = draw(random, n_rows * n_in), weight = draw(random, 3 * n_in * n_out);
    const std::vector<double> grad_out = draw(random, n_rows * n_out);
    std::vector<double> out(n_rows * n_out), grad_weight(weight.size()), parts(n_parts * weight.size());
    const PeakConvParams<double> p{x.data(), weight.data(), out.data(), n_rows, n_in, n_out, shift};
    expect(peak_conv_cuda(p, nullptr) == 0, "peak_conv", 1, 0);
    const PeakConvWeightParams<double> q{x.data(), grad_out.data(), grad_weight.data(), n_rows, n_in, n_out, shift};
    expect(peak_conv_weight_cuda(q, parts.data(), n_parts, nullptr) == 0, "peak_conv_weight", 1, 0);
    std::vector<double> want(out.size(), 0.0), want_weight(weight.size(), 0.0);
    for (int64_t r = 0; r < n_rows; ++r)
        for (int64_t tap = 0; tap < 3; ++tap) {
            const int64_t from = r + (tap - 1) * shift;
            for (int64_t c = 0; from >= 0 && from < n_rows && c < n_in; ++c)
                for (int64_t k = 0; k < n_out; ++k) {
                    const int64_t w = (tap * n_in + c) * n_out + k;
                    want[r * n_out + k] += x[from * n_in + c] * weight[w];
                    want_weight[w] += x[from * n_in + c] * grad_out[r * n_out + k];
                }
        }
    for (size_t i = 0; i < want.size(); ++i) expect_close(out[i], want[i], 100.0, "convolution");
    for (size_t i = 0; i < want_weight.size(); ++i)
        expect_close(grad_weight[i], want_weight[i], 100.0, "gradient of the weights");
}

// A whole stage on a list of rows some of which are halos, with and without widening.
void check_stage(int64_t n_rows, int64_t n_in, int64_t n, bool maximum) {
    std::mt19937 random(13);
    const bool widens = n_in != n;
    const std::vector<double> x = draw(random, n_rows * n_in), first = draw(random, 3 * n_in * n);
    const std::vector<double> second = draw(random, 3 * n * n), widen = draw(random, n_in * n);
    const std::vector<double> offset1 = draw(random, n), offset2 = draw(random, n);
    const int64_t n_out = n_rows / 2 + 1;
    std::vector<int32_t> halo(n_rows), pairs(2 * n_out, -1);
    for (int64_t r = 0; r < n_rows; ++r)
        halo[r] = r % 5 == 0 ? -1 : r % 5 == 4 ? static_cast<int32_t>(n_rows - 2) : static_cast<int32_t>(r);
    for (int64_t j = 0; j < n_out - 1; ++j)
        pairs[j] = static_cast<int32_t>(2 * j), pairs[n_out + j] = static_cast<int32_t>(2 * j + 1);
    std::vector<double> inner(n_rows * n), y(n_rows * n), out(n_out * n);
    const PeakStageParams<double> p{x.data(), first.data(), second.data(), widens ? widen.data() : nullptr,
                                    offset1.data(), offset2.data(), halo.data(), pairs.data(), y.data(), out.data(),
                                    n_rows, n_out, n_in, n, 0, 1, maximum};
    expect(peak_stage_cuda(p, inner.data(), nullptr) == 0, "peak_stage", 1, 0);
    const auto leaky = [](double z) { return z > 0.0 ? z : kNegativeSlope * z; };
    std::vector<double> middle(n_rows * n, 0.0), rows(n_rows * n, 0.0);
    const auto convolve = [&](const auto& value, const std::vector<double>& weight, int64_t width, int64_t r,
                              int64_t k) {
        double sum = 0.0;
        for (int64_t tap = 0; tap < 3; ++tap)
            for (int64_t c = 0; c < width; ++c) sum += value(r + tap - 1, c) * weight[(tap * width + c) * n + k];
        return sum;
    };
    const auto input = [&](int64_t r, int64_t c) { return r < 0 || r >= n_rows ? 0.0 : x[r * n_in + c]; };
    const auto filled = [&](int64_t r, int64_t c) {
        return r < 0 || r >= n_rows || halo[r] < 0 ? 0.0 : middle[halo[r] * n + c];
    };
    for (int64_t r = 0; r < n_rows; ++r)
        for (int64_t k = 0; k < n; ++k) middle[r * n + k] = leaky(convolve(input, first, n_in, r, k) + offset1[k]);
    for (int64_t r = 0; r < n_rows; ++r)
        for (int64_t k = 0; k < n; ++k) {
            double residual = widens ? 0.0 : x[r * n + k];
            for (int64_t c = 0; widens && c < n_in; ++c) residual += x[r * n_in + c] * widen[c * n + k];
            rows[r * n + k] = leaky(convolve(filled, second, n, r, k) + offset2[k] + residual);
        }
    for (int64_t j = 0; j < n_out; ++j)
        for (int64_t k = 0; k < n; ++k) {
            const double a = pairs[j] < 0 ? 0.0 : rows[pairs[j] * n + k];
            const double b = pairs[n_out + j] < 0 ? 0.0 : rows[pairs[n_out + j] * n + k];
            expect_close(out[j * n + k], maximum ? std::max(a, b) : 0.5 * (a + b), 1e4, "stage");
        }
}

}  // namespace

void check_rows() {
#if defined(__SANITIZE_THREAD__)  // making a fiber takes a hundred times as long there
    check_norm(41, 5, true, true);
    check_plan<float>(2, 41, 3);
    check_conv(130, 9, 33, 1, 2);
    check_stage(131, 3, 5, true);
#else
    for (const bool batch : {false, true})
        for (const bool maximum : {false, true}) check_norm(41, 35, maximum, batch);
    for (const int64_t spare : {0, 3, -1}) {
        check_plan<float>(3, 41, spare);
        check_plan<double>(5, 300, spare);  // longer than a block, so that its rows come in two turns
    }
    check_plan<float>(1, 4, 0);
    check_conv(1, 1, 1, 1, 1);
    check_conv(131, 9, 33, 1, 2);
    check_conv(300, 33, 5, -7, 3);
    check_conv(40, 8, 32, 64, 1);  // beyond both ends
    check_stage(131, 3, 35, true);
    check_stage(40, 6, 6, false);
#endif
}
