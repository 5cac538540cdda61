// peak_attention.cpp: CPU attention over active patches, and the whole patch encoder in inference.
//
// One pattern at a time; the keys are packed once, then blocks of queries pass over them with a running maximum. The
// lanes are queries, so softmax and layer norm need no reduction across lanes and all heavy work is `multiply` of
// block_math.h. Floors and what is reached: benchmarks/NOTES.md.
#include "peak_attention.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "block_math.h"
#include "thread_own.h"

namespace xrdfast {
namespace {

constexpr int64_t kKeys = 64;  // a chunk of packed keys; its scores (8 kB with AVX-512) stay in the first-level cache
constexpr int64_t kHidden = 64;  // hidden features of the feed-forward network at a time, for the same reason
static_assert(kKeys % Simd<float, 64>::kBlock == 0, "a block of projected keys lies in one chunk");

// Chunks of kKeys keys, each (key_rows + value_rows, kKeys): a key is a column, and so is its value.
template <typename T>
struct PackedKeys {
    T* data;
    int64_t n_keys;
    int64_t depth;  // rows that enter a score, <= key_rows
    int64_t key_rows;
    int64_t value_rows;

    XRDFAST_INLINE int64_t chunk_size() const { return (key_rows + value_rows) * kKeys; }
    XRDFAST_INLINE T* chunk(int64_t first_key) const { return data + first_key / kKeys * chunk_size(); }
};

template <typename T>
struct Workspace {
    std::vector<int32_t> key;  // places of the active patches
    AlignedBuffer<T> packed, block, rows, x, grads;
};

// Lists the active patches, or all where none is. Returns whether any is.
inline bool list_keys(const bool* active, int64_t n_patches, std::vector<int32_t>& key) {
    key.clear();
    for (int64_t i = 0; i < n_patches; ++i)
        if (active[i]) key.push_back(static_cast<int32_t>(i));
    if (!key.empty()) return true;
    for (int64_t i = 0; i < n_patches; ++i) key.push_back(static_cast<int32_t>(i));
    return false;
}

// Unnormalised attention of one block of queries (depth, kBlock): `out` (value_rows, kBlock) = sum over keys of
// exp(score - largest) value, `sum` that of the exponentials. `score` is scratch (kKeys, kBlock).
template <class S, typename T>
XRDFAST_INLINE void attend(const PackedKeys<T>& keys, const T* query, T* out, T* score,
                                  typename S::Vector (&largest)[2], typename S::Vector (&sum)[2]) {
    using V = typename S::Vector;
    for (int side = 0; side < 2; ++side) {
        largest[side] = V{} + std::numeric_limits<T>::lowest();
        sum[side] = V{};
    }
    for (int64_t first = 0; first < keys.n_keys; first += kKeys) {
        const int64_t here = std::min(kKeys, keys.n_keys - first);
        const T* chunk = keys.chunk(first);
        multiply<S>(chunk, 1, kKeys, query, S::kBlock, score, S::kBlock, round_up(here, kRowStep), keys.depth, Replace{});
        V top[2] = {largest[0], largest[1]};
        RescaleAndAccumulate<V> shrink;
        for (int64_t j = 0; j < here; ++j) {
            for (int side = 0; side < 2; ++side) {
                const V s = load<V>(score + j * S::kBlock + side * S::kLanes);
                top[side] = s > top[side] ? s : top[side];
            }
        }
        for (int side = 0; side < 2; ++side) {
            shrink.factor[side] = exp_nonpositive<S>(largest[side] - top[side], T{});
            largest[side] = top[side];
        }
        V here_sum[2] = {};
        for (int64_t j = 0; j < here; ++j) {
            for (int side = 0; side < 2; ++side) {
                T* at = score + j * S::kBlock + side * S::kLanes;
                const V p = exp_nonpositive<S>(load<V>(at) - top[side], T{});
                store(at, p);
                here_sum[side] += p;
            }
        }
        for (int side = 0; side < 2; ++side) sum[side] = sum[side] * shrink.factor[side] + here_sum[side];
        const T* values = chunk + keys.key_rows * kKeys;
        if (first == 0)
            multiply<S>(values, kKeys, 1, score, S::kBlock, out, S::kBlock, keys.value_rows, here, Replace{});
        else
            multiply<S>(values, kKeys, 1, score, S::kBlock, out, S::kBlock, keys.value_rows, here, shrink);
    }
}

// Rows `first` .. of a (n, width) table as columns of a block (width, kBlock); missing ones are zero.
template <class S, typename T>
XRDFAST_INLINE void load_columns(const T* table, int64_t first, int64_t n, int64_t width, T* __restrict block) {
    const int64_t here = std::min<int64_t>(S::kBlock, n - first);
    const T* rows = table + first * width;
    for (int64_t f = 0; f < width; ++f) {
        for (int64_t i = 0; i < here; ++i) block[f * S::kBlock + i] = rows[i * width + f];
        for (int64_t i = here; i < S::kBlock; ++i) block[f * S::kBlock + i] = T(0);
    }
}

template <class S, typename T>
XRDFAST_INLINE void store_columns(const T* block, int64_t first, int64_t n, int64_t width, T* __restrict table) {
    const int64_t here = std::min<int64_t>(S::kBlock, n - first);
    T* rows = table + first * width;
    for (int64_t i = 0; i < here; ++i)
        for (int64_t f = 0; f < width; ++f) rows[i * width + f] = block[f * S::kBlock + i];
}

// Keys times `key_scale`, and values, of the listed patches.
template <typename T>
PackedKeys<T> pack_keys(const T* key, const T* value, int64_t width, T key_scale, Workspace<T>& ws) {
    const int64_t n_keys = static_cast<int64_t>(ws.key.size());
    PackedKeys<T> keys{nullptr, n_keys, width, width, width};
    const int64_t size = round_up(n_keys, kKeys) / kKeys * keys.chunk_size();
    keys.data = ws.packed.reserve(size);
    std::fill_n(keys.data, size, T(0));
    for (int64_t j = 0; j < n_keys; ++j) {
        T* column = keys.chunk(j) + j % kKeys;
        const T *k = key + ws.key[j] * width, *v = value + ws.key[j] * width;
        for (int64_t f = 0; f < width; ++f) column[f * kKeys] = k[f] * key_scale;
        for (int64_t f = 0; f < width; ++f) column[(width + f) * kKeys] = v[f];
    }
    return keys;
}

template <typename T>
struct AttendPattern {
    const PeakAttentionParams<T>& p;
    int64_t pattern;

    template <int kBytes>
    XRDFAST_INLINE void run() const {
        using S = Simd<T, kBytes>;
        using V = typename S::Vector;
        Workspace<T>& ws = thread_own<Workspace<T>>();
        const int64_t n = p.n_patches, w = p.width, start = pattern * n * w;
        const bool any = list_keys(p.active + pattern * n, n, ws.key);
        const double scale = any ? 1.0 / std::sqrt(static_cast<double>(w)) : 0.0;
        const PackedKeys<T> keys = pack_keys(p.key + start, p.value + start, w, static_cast<T>(scale), ws);
        T* query = ws.block.reserve((2 * w + kKeys) * S::kBlock);
        T *out = query + w * S::kBlock, *score = out + w * S::kBlock;
        for (int64_t first = 0; first < n; first += S::kBlock) {
            load_columns<S>(p.query + start, first, n, w, query);
            V largest[2], sum[2];
            attend<S>(keys, query, out, score, largest, sum);
            for (int side = 0; side < 2; ++side) {
                const V inverse = T(1) / sum[side];
                for (int64_t f = 0; f < w; ++f) {
                    T* at = out + f * S::kBlock + side * S::kLanes;
                    store(at, load<V>(at) * inverse);
                }
                for (int i = 0; i < S::kLanes; ++i) {
                    const int64_t place = first + side * S::kLanes + i;
                    if (place >= n) break;
                    p.logsumexp[pattern * n + place] =
                        largest[side][i] + std::log(static_cast<T>(sum[side][i]));
                }
            }
            store_columns<S>(out, first, n, w, p.output + start);
        }
    }
};

// With P the probabilities and D = P * (dO V^T - rowsum(dO * O)), elementwise products:
//   dQ = scale D K,   dK = scale D^T Q,   dV = P^T dO.
template <typename T>
struct AttendPatternBackward {
    const PeakAttentionBackwardParams<T>& p;
    int64_t pattern;

    template <int kBytes>
    XRDFAST_INLINE void run() const {
        using S = Simd<T, kBytes>;
        using V = typename S::Vector;
        constexpr int64_t kBlock = S::kBlock;
        Workspace<T>& ws = thread_own<Workspace<T>>();
        const int64_t n = p.n_patches, w = p.width, start = pattern * n * w;
        const bool any = list_keys(p.active + pattern * n, n, ws.key);
        const double scale = any ? 1.0 / std::sqrt(static_cast<double>(w)) : 0.0;
        const PackedKeys<T> keys = pack_keys(p.key + start, p.value + start, w, static_cast<T>(scale), ws);
        const int64_t n_padded = round_up(keys.n_keys, kKeys), wide = round_up(w, kBlock);
        T* query = ws.block.reserve((3 * w + 2 * kKeys) * kBlock);  // as columns
        T *grad = query + w * kBlock, *grad_query = grad + w * kBlock;
        T *score = grad_query + w * kBlock, *grad_score = score + kKeys * kBlock;
        T* query_rows = ws.rows.reserve(2 * kBlock * wide);
        T* grad_rows = query_rows + kBlock * wide;
        std::fill_n(query_rows, 2 * kBlock * wide, T(0));
        T* grad_key = ws.grads.reserve(2 * n_padded * wide);
        T* grad_value = grad_key + n_padded * wide;
        std::fill_n(grad_key, 2 * n_padded * wide, T(0));
        for (int64_t first = 0; first < n; first += kBlock) {
            const int64_t here = std::min<int64_t>(kBlock, n - first);
            load_columns<S>(p.query + start, first, n, w, query);
            load_columns<S>(p.grad_output + start, first, n, w, grad);
            alignas(64) T lse[kBlock] = {}, delta[kBlock] = {};
            for (int64_t i = 0; i < here; ++i) {
                const int64_t row = start + (first + i) * w;
                lse[i] = p.logsumexp[pattern * n + first + i];
                for (int64_t f = 0; f < w; ++f) {
                    delta[i] += p.grad_output[row + f] * p.output[row + f];
                    query_rows[i * wide + f] = p.query[row + f];
                    grad_rows[i * wide + f] = p.grad_output[row + f];
                }
            }
            std::fill_n(grad_query, w * kBlock, T(0));
            for (int64_t key = 0; key < keys.n_keys; key += kKeys) {
                const int64_t count = std::min(kKeys, keys.n_keys - key), rows = round_up(count, kRowStep);
                const T *chunk = keys.chunk(key), *values = chunk + w * kKeys;
                multiply<S>(chunk, 1, kKeys, query, kBlock, score, kBlock, rows, w, Replace{});
                multiply<S>(values, 1, kKeys, grad, kBlock, grad_score, kBlock, rows, w, Replace{});
                for (int64_t j = 0; j < rows; ++j) {
                    for (int side = 0; side < 2; ++side) {
                        const int64_t at = j * kBlock + side * S::kLanes;
                        const V probability =
                            exp_nonpositive<S>(load<V>(score + at) - load<V>(lse + side * S::kLanes), T{});
                        const V difference = load<V>(grad_score + at) - load<V>(delta + side * S::kLanes);
                        store(score + at, probability);
                        store(grad_score + at, probability * difference);
                    }
                }
                multiply<S>(chunk, kKeys, 1, grad_score, kBlock, grad_query, kBlock, w, count, Accumulate{});
                for (int64_t column = 0; column < wide; column += kBlock) {
                    const int64_t to = key * wide + column;
                    multiply<S>(grad_score, kBlock, 1, query_rows + column, wide, grad_key + to, wide, rows,
                                      here, Accumulate{});
                    multiply<S>(score, kBlock, 1, grad_rows + column, wide, grad_value + to, wide, rows, here, Accumulate{});
                }
            }
            store_columns<S>(grad_query, first, n, w, p.grad_query + start);
        }
        int64_t j = 0;
        for (int64_t place = 0; place < n; ++place) {
            T *to_key = p.grad_key + start + place * w, *to_value = p.grad_value + start + place * w;
            if (j == keys.n_keys || ws.key[j] != place) {
                std::fill_n(to_key, w, T(0));
                std::fill_n(to_value, w, T(0));
                continue;
            }
            for (int64_t f = 0; f < w; ++f) to_key[f] = grad_key[j * wide + f] * static_cast<T>(scale);
            std::copy_n(grad_value + j * wide, w, to_value);
            ++j;
        }
    }
};

// The tensors of one layer, in the order in which EncodePatchesParams::layers has them.
template <typename T>
struct LayerView {
    const T *query, *query_bias, *key, *key_bias, *value, *value_bias, *output, *output_bias;
    const T *attention_norm, *attention_norm_bias, *expand, *expand_bias, *contract, *contract_bias;
    const T *feed_forward_norm, *feed_forward_norm_bias;

    LayerView(const T* at, int64_t w, int64_t hidden) {
        const auto next = [&at](int64_t n) { return (at += n) - n; };
        query = next(w * w), query_bias = next(w);
        key = next(w * w), key_bias = next(w);
        value = next(w * w), value_bias = next(w);
        output = next(w * w), output_bias = next(w);
        attention_norm = next(w), attention_norm_bias = next(w);
        expand = next(hidden * w), expand_bias = next(hidden);
        contract = next(w * hidden), contract_bias = next(w);
        feed_forward_norm = next(w), feed_forward_norm_bias = next(w);
    }
    static int64_t size(int64_t w, int64_t hidden) { return 4 * (w * w + w) + 4 * w + 2 * hidden * w + hidden + w; }
};

// Weights of one layer as the left factors of `multiply`, with a last row for the bias: blocks of x carry a row of ones.
//
// A score is (Wq x + bq) . (Wk y + bk); what doesn't depend on the key y cancels in the softmax, which leaves
// x . (Wq^T Wk y) + bq . (Wk y): queries need no projection. Probabilities sum to one, so the output map goes into the
// values: Wo (Wv y + bv) + bo.
template <typename T>
struct PackedLayer {
    std::vector<T> keys_values;  // (width + 1, key_rows + width)
    std::vector<T> expand;       // (width + 1, hidden rounded up)
    std::vector<T> contract;     // (hidden rounded up, width)
    LayerView<T> view;

    PackedLayer(const T* tensors, int64_t w, int64_t hidden, int64_t key_rows) : view(tensors, w, hidden) {
        const int64_t rows = key_rows + w, hidden_rows = round_up(hidden, kRowStep);
        keys_values.assign((w + 1) * rows, T(0));
        const double scale = 1.0 / std::sqrt(static_cast<double>(w));
        for (int64_t i = 0; i <= w; ++i) {
            T* row = keys_values.data() + i * rows;
            for (int64_t r = 0; r <= w && i < w; ++r) {  // r = w: the ones of the query
                double sum = 0.0;
                for (int64_t o = 0; o < w; ++o)
                    sum += static_cast<double>(r < w ? view.query[o * w + r] : view.query_bias[o]) * view.key[o * w + i];
                row[r] = static_cast<T>(scale * sum);
            }
            for (int64_t r = 0; r < w; ++r) {
                double sum = i < w ? 0.0 : view.output_bias[r];
                for (int64_t o = 0; o < w; ++o)
                    sum += static_cast<double>(view.output[r * w + o]) *
                           (i < w ? view.value[o * w + i] : view.value_bias[o]);
                row[key_rows + r] = static_cast<T>(sum);
            }
        }
        expand.assign((w + 1) * hidden_rows, T(0));
        contract.assign(hidden_rows * w, T(0));
        for (int64_t h = 0; h < hidden; ++h) {
            for (int64_t f = 0; f < w; ++f) {
                expand[f * hidden_rows + h] = view.expand[h * w + f];
                contract[h * w + f] = view.contract[f * hidden + h];
            }
            expand[w * hidden_rows + h] = view.expand_bias[h];
        }
    }
};

template <typename T>
struct PackedEncoder {
    int64_t key_rows, embedded_rows, n_padded;
    std::vector<T> patch_weight;  // (patch_points, embedded_rows)
    std::vector<T> position;      // (width, n_padded)
    std::vector<PackedLayer<T>> layers;

    explicit PackedEncoder(const EncodePatchesParams<T>& p)
        : key_rows(round_up(p.width + 1, kRowStep)),
          embedded_rows(round_up(p.n_embedded, kRowStep)),
          n_padded(round_up(p.n_patches, 64)),
          patch_weight(p.patch_points * embedded_rows),
          position(p.width * n_padded) {
        for (int64_t i = 0; i < p.patch_points; ++i)
            std::copy_n(p.patch_weight + i * p.n_embedded, p.n_embedded, patch_weight.data() + i * embedded_rows);
        for (int64_t i = 0; i < p.n_patches; ++i)
            for (int64_t f = 0; f < p.width; ++f) position[f * n_padded + i] = p.position[i * p.width + f];
        for (int64_t i = 0; i < p.n_layers; ++i)
            layers.emplace_back(p.layers + i * LayerView<T>::size(p.width, p.hidden), p.width, p.hidden, key_rows);
    }
};

// Layer norm of every column: weight * (x - mean) / sqrt(var + eps) + bias.
template <class S, typename T>
XRDFAST_INLINE void normalise(const T* x, int64_t w, const T* weight, const T* bias, T eps, T* out) {
    using V = typename S::Vector;
    for (int side = 0; side < 2; ++side) {
        const T* from = x + side * S::kLanes;
        V mean{}, variance{};
        for (int64_t f = 0; f < w; ++f) mean += load<V>(from + f * S::kBlock);
        mean /= static_cast<T>(w);
        for (int64_t f = 0; f < w; ++f) {
            const V d = load<V>(from + f * S::kBlock) - mean;
            variance += d * d;
        }
        alignas(64) T inverse[S::kLanes];
        store(inverse, variance / static_cast<T>(w) + eps);
        for (int i = 0; i < S::kLanes; ++i) inverse[i] = T(1) / std::sqrt(inverse[i]);
        const V factor = load<V>(inverse);
        for (int64_t f = 0; f < w; ++f)
            store(out + f * S::kBlock + side * S::kLanes,
                  (load<V>(from + f * S::kBlock) - mean) * factor * weight[f] + bias[f]);
    }
}

template <typename T>
struct EncodePattern {
    const EncodePatchesParams<T>& p;
    const PackedEncoder<T>& encoder;
    int64_t pattern;

    template <int kBytes>
    XRDFAST_INLINE void run() const {
        using S = Simd<T, kBytes>;
        constexpr int64_t kBlock = S::kBlock;
        Workspace<T>& ws = thread_own<Workspace<T>>();
        const int64_t w = p.width, n_blocks = round_up(p.n_patches, kBlock) / kBlock, block_size = (w + 1) * kBlock;
        const int64_t scratch_rows = std::max(2 * w + 1 + std::max(kKeys, kHidden), p.patch_points);
        T* x = ws.x.reserve(n_blocks * block_size);  // blocks of (width + 1, kBlock), the last row all ones
        T* scratch = ws.block.reserve(scratch_rows * kBlock);
        const bool any = embed<S>(x, scratch, ws.key);
        for (const PackedLayer<T>& layer : encoder.layers) {
            const PackedKeys<T> keys = project_keys<S>(layer, x, any, ws);
            for (int64_t b = 0; b < n_blocks; ++b) transform<S>(layer, keys, x + b * block_size, scratch);
        }
        for (int64_t f = 0; f < w; ++f) {
            T largest = x[f * kBlock];
            for (int64_t i = 1; i < p.n_patches; ++i) {
                const T value = x[i / kBlock * block_size + f * kBlock + i % kBlock];
                largest = value > largest || value != value ? value : largest;
            }
            p.features[pattern * w + f] = largest;
        }
    }

    // Fills the blocks of x and lists the keys; returns whether any patch is active.
    template <class S>
    XRDFAST_INLINE bool embed(T* x, T* patches, std::vector<int32_t>& key) const {
        constexpr int64_t kBlock = S::kBlock;
        const int64_t w = p.width, points = p.patch_points;
        const T* intensity = p.intensity + pattern * p.n_patches * points;
        key.clear();
        for (int64_t first = 0; first < p.n_patches; first += kBlock, x += (w + 1) * kBlock) {
            load_columns<S>(intensity, first, p.n_patches, points, patches);
            multiply<S>(encoder.patch_weight.data(), 1, encoder.embedded_rows, patches, kBlock, x, kBlock,
                               encoder.embedded_rows, points, Replace{});
            std::fill_n(x + encoder.embedded_rows * kBlock, (w - encoder.embedded_rows) * kBlock, T(0));
            T largest[kBlock];
            std::copy_n(patches, kBlock, largest);
            for (int64_t j = 1; j < points; ++j)
                for (int64_t i = 0; i < kBlock; ++i) {
                    const T value = patches[j * kBlock + i];
                    largest[i] = (value > largest[i]) | (value != value) ? value : largest[i];
                }
            for (int64_t i = 0; i < kBlock; ++i) x[(w - 1) * kBlock + i] += largest[i];
            for (int64_t f = 0; f < w; ++f)
                for (int64_t i = 0; i < kBlock; ++i) x[f * kBlock + i] += encoder.position[f * encoder.n_padded + first + i];
            std::fill_n(x + w * kBlock, kBlock, T(1));
            for (int64_t i = 0; i < std::min(kBlock, p.n_patches - first); ++i)
                if (!(largest[i] < p.blank)) key.push_back(static_cast<int32_t>(first + i));  // so that NaN is a key
        }
        if (!key.empty()) return true;
        for (int64_t i = 0; i < p.n_patches; ++i) key.push_back(static_cast<int32_t>(i));
        return false;
    }

    template <class S>
    XRDFAST_INLINE PackedKeys<T> project_keys(const PackedLayer<T>& layer, const T* x, bool any,
                                                     Workspace<T>& ws) const {
        constexpr int64_t kBlock = S::kBlock;
        const int64_t w = p.width, n_keys = static_cast<int64_t>(ws.key.size());
        PackedKeys<T> keys{nullptr, n_keys, w + 1, encoder.key_rows, w};
        const int64_t rows = encoder.key_rows + w;
        keys.data = ws.packed.reserve(round_up(n_keys, kKeys) / kKeys * keys.chunk_size());
        T* gathered = ws.rows.reserve((w + 1) * kBlock);
        for (int64_t first = 0; first < n_keys; first += kBlock) {
            for (int64_t i = 0; i < kBlock; ++i) {
                const int64_t place = ws.key[std::min(first + i, n_keys - 1)];
                const T* from = x + place / kBlock * (w + 1) * kBlock + place % kBlock;
                for (int64_t f = 0; f <= w; ++f) gathered[f * kBlock + i] = from[f * kBlock];
            }
            T* to = keys.chunk(first) + first % kKeys;
            multiply<S>(layer.keys_values.data(), 1, rows, gathered, kBlock, to, kKeys, rows, w + 1, Replace{});
            for (int64_t r = 0; r <= w && !any; ++r) std::fill_n(to + r * kKeys, kBlock, T(0));  // equal scores
        }
        return keys;
    }

    // One layer over one block of patches, in place.
    template <class S>
    XRDFAST_INLINE void transform(const PackedLayer<T>& layer, const PackedKeys<T>& keys, T* x,
                                         T* scratch) const {
        using V = typename S::Vector;
        constexpr int64_t kBlock = S::kBlock;
        const int64_t w = p.width, hidden_rows = round_up(p.hidden, kRowStep);
        T *y = scratch, *out = y + (w + 1) * kBlock, *inner = out + w * kBlock;
        V largest[2], sum[2];
        attend<S>(keys, x, out, inner, largest, sum);
        for (int side = 0; side < 2; ++side) {
            const V inverse = T(1) / sum[side];
            for (int64_t f = 0; f < w; ++f) {
                const int64_t at = f * kBlock + side * S::kLanes;
                store(out + at, load<V>(out + at) * inverse + load<V>(x + at));
            }
        }
        normalise<S>(out, w, layer.view.attention_norm, layer.view.attention_norm_bias, p.norm_eps, y);
        std::fill_n(y + w * kBlock, kBlock, T(1));
        for (int64_t f = 0; f < w; ++f)
            for (int64_t i = 0; i < kBlock; ++i) out[f * kBlock + i] = y[f * kBlock + i] + layer.view.contract_bias[f];
        for (int64_t h = 0; h < hidden_rows; h += kHidden) {
            const int64_t here = std::min(kHidden, hidden_rows - h);
            multiply<S>(layer.expand.data() + h, 1, hidden_rows, y, kBlock, inner, kBlock, here, w + 1, Replace{});
            for (int64_t i = 0; i < here * kBlock; i += S::kLanes) {
                const V value = load<V>(inner + i);
                store(inner + i, value > T(0) ? value : value * p.leaky_slope);
            }
            multiply<S>(layer.contract.data() + h * w, 1, w, inner, kBlock, out, kBlock, w, here, Accumulate{});
        }
        normalise<S>(out, w, layer.view.feed_forward_norm, layer.view.feed_forward_norm_bias, p.norm_eps, x);
    }
};

}  // namespace

template <typename T>
void peak_attention_forward_cpu(const PeakAttentionParams<T>& params, int n_threads) {
#pragma omp parallel for schedule(dynamic) num_threads(n_threads) if (params.n_patterns > 1 && n_threads > 1)
    for (int64_t i = 0; i < params.n_patterns; ++i) run_best(AttendPattern<T>{params, i});
}

template <typename T>
void peak_attention_backward_cpu(const PeakAttentionBackwardParams<T>& params, int n_threads) {
#pragma omp parallel for schedule(dynamic) num_threads(n_threads) if (params.n_patterns > 1 && n_threads > 1)
    for (int64_t i = 0; i < params.n_patterns; ++i) run_best(AttendPatternBackward<T>{params, i});
}

template <typename T>
void encode_patches_cpu(const EncodePatchesParams<T>& params, int n_threads) {
    const PackedEncoder<T> encoder(params);
#pragma omp parallel for schedule(dynamic) num_threads(n_threads) if (params.n_patterns > 1 && n_threads > 1)
    for (int64_t i = 0; i < params.n_patterns; ++i) run_best(EncodePattern<T>{params, encoder, i});
}

template void peak_attention_forward_cpu(const PeakAttentionParams<float>&, int);
template void peak_attention_forward_cpu(const PeakAttentionParams<double>&, int);
template void peak_attention_backward_cpu(const PeakAttentionBackwardParams<float>&, int);
template void peak_attention_backward_cpu(const PeakAttentionBackwardParams<double>&, int);
template void encode_patches_cpu(const EncodePatchesParams<float>&, int);
template void encode_patches_cpu(const EncodePatchesParams<double>&, int);

}  // namespace xrdfast
