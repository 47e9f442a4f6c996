// dW and db of a conv block as a matrix product over the positions of the conv map.
//
//   rows: output channels     columns: taps x input channels     sum: positions of all images
//
// A block owns 32 rows and up to 72 units of 8 columns, and goes from box to box of its part of the
// outputs. Per box it loads the patch of the input once for all taps, as conv_block_gemm.h does,
// and the box's pooled gradients and winners. The map's gradient is expanded in registers: a step
// of the sum is 4 windows by 4 places, and the four places that a thread holds of a row are those
// of one window, of which at most one is not zero. Columns are read from the patch, whose pixels
// lie wherever a table of positions says. Warps that share units take turns at the steps and are
// added up at the end, in order; so are the parts, by sum_chunks_kernel.
//
// Thread 4 g + t holds rows g and g + 8 of a fragment, which are channels 2 g and 2 g + 1: they lie
// side by side.
#include "cuda/conv_block_gemm.h"

namespace fastcls::cuda {

namespace {

constexpr int kGradThreads = 8 * kWarpSize;
constexpr int kGradFragments = kGradChannels / 16;
using GradSums = float[kGradFragments][kGradUnits][4];  // as in conv_block_gemm.h

// ---- where things are

// Bytes from a position's first tap to the first channel of a unit; beyond the last unit to that of
// the first.
__device__ inline int unit_offset(const ConvBlockShape& s, const GemmTile& t, int unit, int bytes,
                                  bool fold) {
  const int across = fold ? 1 : static_cast<int>(s.kernel_w);
  const int tap = fold ? unit * 8 / (t.depth_bytes / bytes) : unit % t.taps;
  const int piece = fold ? unit - tap * (t.depth_bytes / bytes / 8) : unit / t.taps;
  if (tap >= t.taps || piece * 8 * bytes >= t.depth_bytes) return 0;
  return tap / across * static_cast<int>(s.dilation_h) * t.row_bytes +
         tap % across * static_cast<int>(s.dilation_w) * t.pixel_bytes + piece * 8 * bytes;
}

// Where the gradient of a unit's column goes in a row of taps x C elements; -1: nowhere.
__device__ inline int64_t grad_element(const ConvBlockShape& s, const GemmTile& t, int unit,
                                       int column, int chunk, int bytes, bool fold) {
  int tap, channel;
  if (fold) {
    const int depth = t.depth_bytes / bytes, row = unit * 8 / depth;
    const int at = unit * 8 - row * depth + column, x = at / t.channels;
    tap = row * static_cast<int>(s.kernel_w) + x, channel = at % t.channels;
    if (x >= s.kernel_w) return -1;
  } else {
    tap = unit % t.taps, channel = unit / t.taps * 8 + column;
    if (channel >= t.channels) return -1;
  }
  const int64_t c = static_cast<int64_t>(chunk) * t.channels + channel;
  return c < s.C ? tap * s.C + c : -1;
}

// The positions of the box in the order of the sum, as bytes from the patch's start to their first
// tap. In a step, position 2 t + (0, 1, 8, 9)[j] is what thread t takes as its j-th: place 4 q + j
// of the step's window t, or where a window is one position, output 4 j + t. Beyond the last window
// and its last place lie gradients of zero, and the first one's pixels.
__device__ inline void fill_positions(const ConvBlockShape& s, const WeightGradPlan& p,
                                      int* positions) {
  const GemmTile& t = p.tile;
  const int window = static_cast<int>(s.window()), pool_w = static_cast<int>(s.pool_w);
  for (int i = threadIdx.x; i < p.steps * kGradStep; i += blockDim.x) {
    const int step = i / kGradStep, k = i % kGradStep;
    const int lane = k % 8 / 2, j = k / 8 * 2 + k % 2;
    int unit = step * kGradStep + 4 * j + lane, place = 0;
    if (window > 1) unit = step / p.window_steps * 4 + lane, place = step % p.window_steps * 4 + j;
    const Unit u = unit_at(t, unit < t.units ? unit : 0);
    if (place >= window) place = 0;
    const int y = u.y * t.step_h + place / pool_w * static_cast<int>(s.stride_h);
    const int x = u.x * t.step_w + place % pool_w * static_cast<int>(s.stride_w);
    positions[i] = u.image * t.image_bytes + y * t.row_bytes + column_offset(t, x);
  }
}

// ---- pooled gradients and codes in shared memory, [outputs of the box, 32 channels]

template <typename T>
struct GradSource {
  View4<const T> g;  // pooled gradient [N, K, out_h, out_w]
  Codes codes;
  bool vectors, code_vectors;  // channels lie in aligned 16-byte vectors
  bool channels_inner;

  // Output `unit` of the box; false: there is none.
  __device__ static bool find(const ConvBlockShape& s, const GemmTile& t, const Box& box, int unit,
                              int64_t* n, int* h, int* w) {
    const Unit u = unit_at(t, unit);
    *n = box.n + u.image, *h = box.out_h + u.y, *w = box.out_w + u.x;
    return unit < t.units && *n < s.N && *h < s.out_h && *w < s.out_w;
  }

  __device__ void load_grads(const ConvBlockShape& s, const GemmTile& t, const Box& box, int64_t k0,
                             int outputs, int row_bytes, unsigned char* to) const {
    constexpr int kSize = Vector<T>::kSize, kVectors = kGradChannels / kSize;
#pragma unroll 1
    for (int i = threadIdx.x; i < outputs * kVectors; i += blockDim.x) {
      const int unit = channels_inner ? i / kVectors : i % outputs;
      const int vector = channels_inner ? i % kVectors : i / outputs;
      int64_t n;
      int h, w;
      const bool inside = find(s, t, box, unit, &n, &h, &w);
      const int64_t k = k0 + vector * kSize;
      unsigned char* const at = to + unit * row_bytes + vector * 16;
      if (vectors) {
        const bool zeros = !inside || k >= s.K;
        copy_async(at, zeros ? g.data : g.at(n, k, h, w), zeros);
        continue;
      }
      Vector<T> v;
#pragma unroll
      for (int e = 0; e < kSize; ++e)
        v.e[e] = inside && k + e < s.K ? *g.at(n, k + e, h, w) : static_cast<T>(0.0f);
      *reinterpret_cast<Vector<T>*>(at) = v;
    }
  }

  // Codes of gradients that are zero do not matter.
  __device__ void load_codes(const ConvBlockShape& s, const GemmTile& t, const Box& box, int64_t k0,
                             int outputs, unsigned char* to) const {
    constexpr int kVectors = kGradChannels / 16;
    const uint8_t* const data = static_cast<const uint8_t*>(codes.data);
#pragma unroll 1
    for (int i = threadIdx.x; i < outputs * kVectors; i += blockDim.x) {
      const int unit = i / kVectors;
      int64_t n, k = k0 + i % kVectors * 16;
      int h, w;
      const bool inside = data && find(s, t, box, unit, &n, &h, &w) && k < s.K;
      unsigned char* const at = to + unit * kGradCodeBytes + i % kVectors * 16;
      const int64_t first = inside ? ((n * s.out_h + h) * s.out_w + w) * s.K + k : 0;
      if (code_vectors) {
        copy_async(at, data + first, !inside);
        continue;
      }
      for (int e = 0; e < 16; ++e) at[e] = inside && k + e < s.K ? data[first + e] : 0;
    }
  }
};

template <typename T>
GradSource<T> grad_source(const ConvBlockShape& s, const View4<const T>& g, const Codes& codes) {
  const bool aligned = s.K % 16 == 0 && reinterpret_cast<uintptr_t>(codes.data) % 16 == 0;
  return {g, codes, channels_are_vectors(g, s.K), codes.data && aligned, g.c <= g.w};
}

// ---- a thread's gradients: of channels 2 g and 2 g + 1 at output t

template <typename T>
struct GradPair {
  T e[2];
};

// db: those that pass the ReLU.
template <typename T>
__device__ void add_bias_grads(const GradPair<T>& grad, const uint8_t (&code)[2],
                               float (&sums)[2]) {
  for (int h = 0; h < 2; ++h)
    if (code[h] != kShut<uint8_t>) sums[h] += static_cast<float>(grad.e[h]);
}

// The gradient at places first and first + 1, as the two halves of a word: all zero, or moved to
// where the winner is.
__device__ inline uint32_t at_places(uint32_t half, int code, int first) {
  return shift_left(half, 16u * static_cast<unsigned>(code - first));
}

// What a warp reads of the box for one step.
struct GradStep {
  const unsigned char *grads, *codes;  // of the thread's channels, at the step's first output
  int row_bytes;
  const int* positions;
  const unsigned char* patch;
};

// The same for all of the thread's steps: where its units lie, and how many there are. Of 16-bit
// elements two units are loaded at a time, one with the addresses of lanes 0 to 15, the other with
// those of the others; a unit after the last is multiplied for nothing.
struct GradColumns {
  int units;
  int offset[kGradUnits];
};

// ---- multiplying: a step is one product of 16-bit elements, two of tf32, 16 multiply-adds

template <typename T>
__device__ GradPair<T> load_pair(const GradStep& at, int output, int fragment) {
  struct alignas(2 * sizeof(T)) Pair {
    T e[2];
  };
  const auto pair = *reinterpret_cast<const Pair*>(at.grads + output * at.row_bytes +
                                                   fragment * 16 * static_cast<int>(sizeof(T)));
  return {{pair.e[0], pair.e[1]}};
}

__device__ inline void load_codes(const GradStep& at, int output, int fragment,
                                  uint8_t (&code)[2]) {
  const auto both =
      *reinterpret_cast<const uint16_t*>(at.codes + output * kGradCodeBytes + fragment * 16);
  code[0] = static_cast<uint8_t>(both), code[1] = static_cast<uint8_t>(both >> 8);
}

// The four words of both channels: places or outputs j = 0, 1 | 2, 3 as f(channel, j) gives them.
// Calls use(grad, code, output) for each pair of gradients, to expand and to add up.
template <typename T, bool kWindows, typename Use>
__device__ void for_pairs(const GradStep& at, int fragment, const Use& use) {
#pragma unroll
  for (int j = 0; j < (kWindows ? 1 : 4); ++j) {
    uint8_t code[2];
    load_codes(at, 4 * j, fragment, code);
    use(load_pair<T>(at, 4 * j, fragment), code, j);
  }
}

template <typename Math, bool kWindows>
__device__ void multiply_halves(const GradStep& at, int place, bool first_of_window,
                                const GradColumns& columns, float (&bias)[kGradFragments][2],
                                GradSums& sums) {
  using T = typename Math::Element;
  const int lane = threadIdx.x % kWarpSize;
  uint32_t a[kGradFragments][4] = {};
#pragma unroll
  for (int m = 0; m < kGradFragments; ++m)
    for_pairs<T, kWindows>(at, m, [&](const GradPair<T>& grad, const uint8_t (&code)[2], int j) {
      if (first_of_window) add_bias_grads(grad, code, bias[m]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t half = bits_as<uint16_t>(grad.e[h]);
        if constexpr (kWindows) {
          a[m][h] = at_places(half, code[h], place);
          a[m][2 + h] = at_places(half, code[h], place + 2);
        } else {
          a[m][j / 2 * 2 + h] |= code[h] == 0 ? half << (j % 2 * 16) : 0;
        }
      }
    });
  const unsigned char* const row = at.patch + at.positions[lane % 16];
#pragma unroll
  for (int j = 0; j < kGradUnits; j += 2) {
    if (j >= columns.units) break;
    uint32_t b[4];
    load_matrices_transposed(b, row + columns.offset[j / 2]);
#pragma unroll
    for (int m = 0; m < kGradFragments; ++m) {
      Math::multiply(sums[m][j], a[m], b[0], b[1]);
      if (j + 1 < kGradUnits) Math::multiply(sums[m][j + 1], a[m], b[2], b[3]);
    }
  }
}

// Of tf32, thread t holds the first place or output and, in the second word, the next.
template <typename Math, bool kWindows>
__device__ void multiply_tf32(const GradStep& at, int place, bool first_of_window,
                              const GradColumns& columns, float (&bias)[kGradFragments][2],
                              GradSums& sums) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  uint32_t a[2][kGradFragments][4] = {};  // of places 0 and 1, 2 and 3
#pragma unroll
  for (int m = 0; m < kGradFragments; ++m)
    for_pairs<float, kWindows>(
        at, m, [&](const GradPair<float>& grad, const uint8_t (&code)[2], int output) {
          if (first_of_window) add_bias_grads(grad, code, bias[m]);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t value = to_tf32(grad.e[h]);
#pragma unroll
            for (int j = 0; j < 4; ++j)
              if (kWindows || j == output)
                a[j / 2][m][j % 2 * 2 + h] = code[h] == (kWindows ? place + j : 0) ? value : 0;
          }
        });
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const unsigned char* const left = at.patch + at.positions[8 * pair + 2 * t] + 4 * g;
    const unsigned char* const right = at.patch + at.positions[8 * pair + 2 * t + 1] + 4 * g;
#pragma unroll
    for (int j = 0; j < kGradUnits; ++j) {
      if (j >= columns.units) break;
      const uint32_t b0 = to_tf32(*reinterpret_cast<const float*>(left + columns.offset[j]));
      const uint32_t b1 = to_tf32(*reinterpret_cast<const float*>(right + columns.offset[j]));
#pragma unroll
      for (int m = 0; m < kGradFragments; ++m) Math::multiply(sums[m][j], a[pair][m], b0, b1);
    }
  }
}

// With multiply-adds a thread's sums are of rows g and g + 8 and of columns 2 t and 2 t + 1, so
// that it goes over all 16 positions of the step; `at` is that of output 0.
template <bool kWindows>
__device__ void multiply_floats(const GradStep& at, int place, bool first_of_window,
                                const GradColumns& columns, float (&bias)[kGradFragments][2],
                                GradSums& sums) {
  const int t = threadIdx.x % 4;
#pragma unroll 1
  for (int output = 0; output < (kWindows ? 4 : kGradStep); ++output) {
    GradPair<float> grad[kGradFragments];
    uint8_t code[kGradFragments][2];
#pragma unroll
    for (int m = 0; m < kGradFragments; ++m) {
      grad[m] = load_pair<float>(at, output, m);
      load_codes(at, output, m, code[m]);
      if (first_of_window && output % 4 == t) add_bias_grads(grad[m], code[m], bias[m]);
    }
#pragma unroll 1
    for (int j = 0; j < (kWindows ? 4 : 1); ++j) {
      const int lane = output % 4, nth = kWindows ? j : output / 4;
      const int position = at.positions[nth / 2 * 8 + 2 * lane + nth % 2];
      float a[kGradFragments][2];
#pragma unroll
      for (int m = 0; m < kGradFragments; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          a[m][h] = code[m][h] == (kWindows ? place + j : 0) ? grad[m].e[h] : 0.0f;
#pragma unroll
      for (int u = 0; u < kGradUnits; ++u) {
        if (u >= columns.units) break;
        struct alignas(8) Pair {
          float e[2];
        };
        const auto b =
            *reinterpret_cast<const Pair*>(at.patch + position + columns.offset[u] + 8 * t);
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int m = 0; m < kGradFragments; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) sums[m][u][2 * h + e] += a[m][h] * b.e[e];
      }
    }
  }
}

template <typename Math, bool kWindows>
__device__ void multiply_step(const GradStep& at, int place, bool first_of_window,
                              const GradColumns& columns, float (&bias)[kGradFragments][2],
                              GradSums& sums) {
  if constexpr (!Layout<Math>::kMatrixUnit)
    multiply_floats<kWindows>(at, place, first_of_window, columns, bias, sums);
  else if constexpr (sizeof(typename Math::Element) == 2)
    multiply_halves<Math, kWindows>(at, place, first_of_window, columns, bias, sums);
  else
    multiply_tf32<Math, kWindows>(at, place, first_of_window, columns, bias, sums);
}

// ---- adding up

// The sums of the warps that took turns, in the first of them; `room` has a place for each thread
// of warps_n warps.
__device__ inline void add_up_warps(const WeightGradPlan& p, int warp_k, int warp_n, float* room,
                                    GradSums& sums) {
  constexpr int kEach = kGradFragments * kGradUnits * 4;
  float* const own = room + warp_n * kEach * kWarpSize + threadIdx.x % kWarpSize;
  for (int turn = 1; turn < p.warps_k; ++turn) {
    __syncthreads();
    if (warp_k == turn)
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        own[i * kWarpSize] = sums[i / 4 / kGradUnits][i / 4 % kGradUnits][i % 4];
    __syncthreads();
    if (warp_k == 0)
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        sums[i / 4 / kGradUnits][i / 4 % kGradUnits][i % 4] += own[i * kWarpSize];
  }
  __syncthreads();
}

// The block's part of db, from the sums of the threads of warps with the first units.
__device__ inline void store_bias_grad(const ConvBlockShape& s, const WeightGradPlan& p, int warp_k,
                                       int warp_n, int64_t k0,
                                       const float (&bias)[kGradFragments][2], float* room,
                                       float* to, int64_t elements) {
  const int lane = threadIdx.x % kWarpSize;
  __syncthreads();
  if (warp_n == 0)
    for (int m = 0; m < kGradFragments; ++m)
      for (int h = 0; h < 2; ++h)
        room[(warp_k * 4 + lane % 4) * kGradChannels + m * 16 + lane / 4 * 2 + h] = bias[m][h];
  __syncthreads();
  const int k = threadIdx.x;
  if (k >= kGradChannels || k0 + k >= s.K) return;
  float sum = 0;
  for (int i = 0; i < p.warps_k * 4; ++i) sum += room[i * kGradChannels + k];
  to[(k0 + k) * elements + elements - 1] = sum;
}

// ---- the kernel

// Grid: x has the parts of the boxes, y the output channels, 32 at a time, and the chunks of input
// channels. partial [parts, K, taps x C + 1]. Shared memory: two patches, gradients and codes of
// two boxes, positions; at the end room to add up.
template <typename Math, bool kWindows>
__global__ void __launch_bounds__(kGradThreads, 2)
    weight_grad_kernel(ConvBlockShape s, WeightGradPlan p, InputSource<Math> input,
                       GradSource<typename Math::Element> source, float* partial) {
  using T = typename Math::Element;
  const GemmTile& t = p.tile;
  if constexpr (Layout<Math>::kMatrixUnit && !FASTCLS_SM80) return trap();
  DYNAMIC_SHARED(shared);
  const int row_bytes = grad_row_bytes(p.config);
  const int outputs = p.steps / p.window_steps * (kWindows ? 4 : kGradStep);
  unsigned char* const patches = shared;
  unsigned char* const grads = patches + 2 * t.patch_bytes;
  unsigned char* const codes = grads + 2 * outputs * row_bytes;
  int* const positions = reinterpret_cast<int*>(codes + 2 * outputs * kGradCodeBytes);
  const int chunk = blockIdx.y % t.chunks;
  const int64_t k0 = static_cast<int64_t>(blockIdx.y / t.chunks) * kGradChannels;
  const int warp = threadIdx.x / kWarpSize, warp_n = warp % p.warps_n, warp_k = warp / p.warps_n;
  const int lane = threadIdx.x % kWarpSize, first_unit = warp_n * p.each_n;

  fill_positions(s, p, positions);
  GradColumns columns;
  columns.units = p.units - first_unit < p.each_n ? p.units - first_unit : p.each_n;
  constexpr bool kPairs = sizeof(T) == 2;
#pragma unroll
  for (int j = 0; j < (kPairs ? (kGradUnits + 1) / 2 : kGradUnits); ++j) {
    const int unit = first_unit + (kPairs ? 2 * j + lane / 16 : j);
    columns.offset[j] = unit_offset(s, t, unit, sizeof(T), p.config.fold);
  }

  // Box by box: the next one is on its way while this one is multiplied.
  const int boxes = static_cast<int>(t.boxes), each = (boxes + gridDim.x - 1) / gridDim.x;
  const int first = blockIdx.x * each, last = first + each < boxes ? first + each : boxes;
  GradSums sums = {};
  float bias[kGradFragments][2] = {};
#pragma unroll 1
  for (int i = first - 1; i < last; ++i) {
    if (i + 1 < last) {
      const Box box = box_at(s, t, i + 1);
      const int slot = (i + 1 - first) % 2;
      source.load_grads(s, t, box, k0, outputs, row_bytes, grads + slot * outputs * row_bytes);
      source.load_codes(s, t, box, k0, outputs, codes + slot * outputs * kGradCodeBytes);
      if (p.config.fold)
        input.load_folded(s, t, patches + slot * t.patch_bytes, box);
      else
        load_patch<Math>(s, t, input, patches + slot * t.patch_bytes, box, chunk);
    }
    copy_async_commit();
    if (i < first) continue;
    copy_async_wait<1>();
    __syncthreads();
    const int slot = (i - first) % 2;
    const int own = Layout<Math>::kMatrixUnit ? lane % 4 : 0;  // output of a step
#pragma unroll 1
    for (int step = warp_k; step < p.steps; step += p.warps_k) {
      const int windows = kWindows ? step / p.window_steps : step;
      const int output = slot * outputs + windows * (kWindows ? 4 : kGradStep) + own;
      const int place = kWindows ? (step - windows * p.window_steps) * 4 : 0;
      const GradStep at{grads + output * row_bytes + lane / 4 * 2 * static_cast<int>(sizeof(T)),
                        codes + output * kGradCodeBytes + lane / 4 * 2, row_bytes,
                        positions + step * kGradStep, patches + slot * t.patch_bytes};
      multiply_step<Math, kWindows>(at, place, warp_n == 0 && place == 0, columns, bias, sums);
    }
    __syncthreads();
  }
  copy_async_wait<0>();

  // The block's part of the sums.
  const int64_t elements = weight_grad_elements(s);
  float* const room = reinterpret_cast<float*>(shared);
  float* const to = partial + blockIdx.x * s.K * elements;
  if (chunk == 0) store_bias_grad(s, p, warp_k, warp_n, k0, bias, room, to, elements);
  add_up_warps(p, warp_k, warp_n, room, sums);
  if (warp_k != 0) return;
#pragma unroll
  for (int j = 0; j < kGradUnits; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (j >= columns.units) continue;
      const int64_t element =
          grad_element(s, t, first_unit + j, lane % 4 * 2 + e, chunk, sizeof(T), p.config.fold);
      if (element < 0) continue;
#pragma unroll
      for (int m = 0; m < kGradFragments; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int64_t k = k0 + m * 16 + lane / 4 * 2 + h;
          if (k < s.K) to[k * elements + element] = sums[m][j][2 * h + e];
        }
    }
}

template <typename Math, bool kWindows>
void launch_backward_weight(const Launcher& launch, const ConvBlockShape& s,
                            const WeightGradPlan& plan, const BackwardTensors& t,
                            const Tensor& partial) {
  using Element = typename Math::Element;
  launch.with_shared(plan.tile.shared_bytes, weight_grad_kernel<Math, kWindows>,
                     dim3(plan.splits, plan.channel_blocks * plan.tile.chunks), kGradThreads, s,
                     plan, input_source<Math>(const_view<Element>(t.input), s.C),
                     grad_source<Element>(s, const_view<Element>(t.grad_out), t.codes),
                     static_cast<float*>(partial.mutable_data_ptr()));
}

}  // namespace

void launch_gemm_backward_weight(const Launcher& launch, const ConvBlockShape& s,
                                 const WeightGradPlan& plan, Arithmetic a,
                                 const BackwardTensors& t) {
  const Tensor partial =
      empty_flat({plan.splits, s.K, weight_grad_elements(s)}, ScalarType::Float, t.input);
  dispatch_arithmetic(a, [&](auto math) {
    if (s.window() > 1)
      launch_backward_weight<decltype(math), true>(launch, s, plan, t, partial);
    else
      launch_backward_weight<decltype(math), false>(launch, s, plan, t, partial);
  });
  launch_sum_chunks(launch, s, plan.splits, partial, t);
}

}  // namespace fastcls::cuda
