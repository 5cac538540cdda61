// winograd.h: the transforms of Winograd's short convolution. Plain C++; no torch, no CUDA headers.
#pragma once
#include <cstdint>

namespace xrdfast {

// Winograd's F(2, 3): two neighbouring positions of a 3-wide convolution from four products instead of six. A tile is the
// positions 2t and 2t + 1; the products in between, x-plane times weight-plane, are the library's. A position holds
// `size` numbers (patterns times channels); planes are (4, n_tiles, size) for the tiles [tile_begin, tile_end) asked for.
//   x: d0 - d2, d1 + d2, d2 - d1, d1 - d3 with d the positions 2t - 1 .. 2t + 2, zero beyond both ends
//   y: m0 + m1 + m2, m1 - m2 - m3
//   w: w0, (w0 + w1 + w2) / 2, (w0 - w1 + w2) / 2, w2
// and, for the gradient of w, the transposed maps of y and w.
template <typename T>
struct WinogradParams {
    T* rows;    // (n_positions, size), read or written
    T* planes;  // (4, n_tiles, size), written or read
    int64_t n_positions;
    int64_t size;
    int64_t tile_begin;
    int64_t tile_end;
};

template <typename T>
void winograd_input_cpu(const WinogradParams<T>& params, int n_threads);
template <typename T>
void winograd_output_cpu(const WinogradParams<T>& params, int n_threads);
// planes from the gradient of y.
template <typename T>
void winograd_output_backward_cpu(const WinogradParams<T>& params, int n_threads);
// (4, size) planes from (3, size) taps, the last tap first where `reversed`; and the gradient of the taps.
template <typename T>
void winograd_weight_cpu(const T* weight, T* planes, int64_t size, bool reversed, int n_threads);
template <typename T>
void winograd_weight_backward_cpu(const T* planes, T* grad_weight, int64_t size, int n_threads);

}  // namespace xrdfast
