// dW and db of a conv block as a matrix product over the positions of the conv map.
//
//   rows: output channels     columns: taps x input channels     sum: positions of all images
//
// A block owns 32 rows and up to 72 units of 8 columns, and goes from box to box of its part of the
// outputs. Per box it loads the patch of the input once for all taps, as conv_block_patch.h has it,
// and the box's pooled gradients and winners. The map's gradient is expanded in registers: a step
// of the sum is 4 windows by 4 places, and the four places that a thread holds of a row are those
// of one window, of which at most one is not zero. Columns are read from the patch, whose pixels
// lie wherever a table of positions says. Warps that share units take turns at the steps and are
// added up at the end, in order; so are the parts, by sum_chunks_kernel.
//
// Thread 4 g + t holds rows g and g + 8 of a fragment, which are channels 2 g and 2 g + 1: they lie
// side by side.
#include "cuda/conv_block_grads.h"

namespace fastcls::cuda {

namespace {

constexpr int kGradThreads = 8 * kWarpSize;
constexpr int kGradFragments = kGradChannels / 16;  // or 1, of up to 16 channels
constexpr int kFewGradUnits = 6;                    // of a 3 x 3 kernel over a folded patch
// As in conv_block_gemm.h, of a warp's units.
template <int kM, int kUnits>
using GradSums = float[kM][kUnits][4];

// ---- a thread's gradients: of channels 2 g and 2 g + 1 at output t

template <typename T>
struct GradPair {
  T e[2];
};

__device__ inline int code_of(uint16_t both, int h) { return both >> 8 * h & 0xff; }

// db: those that pass the ReLU.
template <typename T>
__device__ void add_bias_grads(const GradPair<T>& grad, uint16_t codes, float (&sums)[2]) {
  for (int h = 0; h < 2; ++h)
    if (code_of(codes, h) != kShut<uint8_t>) sums[h] += static_cast<float>(grad.e[h]);
}

// The gradient at places first and first + 1, as the two halves of a word: all zero, or moved to
// where the winner is.
__device__ inline uint32_t at_places(uint32_t half, int code, int first) {
  return shift_left(half, 16u * static_cast<unsigned>(code - first));
}

// What a warp reads of the box for one step.
struct GradStep {
  const unsigned char *grads, *codes;  // of the thread's channels, at the step's first output
  const int* positions;
  const unsigned char* patch;
};

// The same for all of the thread's steps: where its units lie. Of 16-bit elements two units are
// loaded at a time, one with the addresses of lanes 0 to 15, the other with those of the others.
// Units after the last are multiplied for nothing: a branch would keep loads and products apart.
template <int kUnits>
struct GradColumns {
  int offset[kUnits];
};

// ---- multiplying: a step is one product of 16-bit elements, two of tf32, 16 multiply-adds

template <typename T>
__device__ GradPair<T> load_pair(const GradStep& at, int output, int fragment) {
  struct alignas(2 * sizeof(T)) Pair {
    T e[2];
  };
  const auto pair = *reinterpret_cast<const Pair*>(at.grads + output * kGradRow<T> +
                                                   fragment * 16 * static_cast<int>(sizeof(T)));
  return {{pair.e[0], pair.e[1]}};
}

__device__ inline uint16_t load_codes(const GradStep& at, int output, int fragment) {
  return *reinterpret_cast<const uint16_t*>(at.codes + output * kGradCodeBytes + fragment * 16);
}

// Calls use(gradients, codes, 0) for the thread's own output; where a window is one position,
// use(gradients, codes, j) for its outputs first + j.
template <typename T, int kPlaces, int kOutputs, typename Use>
__device__ void for_outputs(const GradStep& at, int fragment, int first, const Use& use) {
#pragma unroll
  for (int j = 0; j < (kPlaces > 1 ? 1 : kOutputs); ++j) {
    const int output = kPlaces > 1 ? 0 : 4 * (first + j);
    use(load_pair<T>(at, output, fragment), load_codes(at, output, fragment), j);
  }
}

template <typename Math, int kPlaces, int kM, int kUnits>
__device__ void multiply_halves(const GradStep& at, int place, bool first_of_window,
                                const GradColumns<kUnits>& columns, float (&bias)[kM][2],
                                GradSums<kM, kUnits>& sums) {
  using T = typename Math::Element;
  const int lane = threadIdx.x % kWarpSize;
  uint32_t a[kM][4] = {};
#pragma unroll
  for (int m = 0; m < kM; ++m)
    for_outputs<T, kPlaces, 4>(at, m, 0, [&](const GradPair<T>& grad, uint16_t codes, int j) {
      if (first_of_window) add_bias_grads(grad, codes, bias[m]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t half = bits_as<uint16_t>(grad.e[h]);
        if constexpr (kPlaces > 1) {
          a[m][h] = at_places(half, code_of(codes, h), place);
          a[m][2 + h] = at_places(half, code_of(codes, h), place + 2);
        } else {
          a[m][j / 2 * 2 + h] |= code_of(codes, h) == 0 ? half << (j % 2 * 16) : 0;
        }
      }
    });
  const unsigned char* const row = at.patch + at.positions[lane % 16];
#pragma unroll
  for (int j = 0; j < kUnits; j += 2) {
    uint32_t b[4];
    load_matrices_transposed(b, row + columns.offset[j / 2]);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      Math::multiply(sums[m][j], a[m], b[0], b[1]);
      if (j + 1 < kUnits) Math::multiply(sums[m][j + 1], a[m], b[2], b[3]);
    }
  }
}

// Of tf32, two products: of places or outputs 0 and 1, 2 and 3, the first of them in the first
// word.
template <typename Math, int kPlaces, int kM, int kUnits>
__device__ void multiply_tf32(const GradStep& at, int place, bool first_of_window,
                              const GradColumns<kUnits>& columns, float (&bias)[kM][2],
                              GradSums<kM, kUnits>& sums) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll 1  // registers are scarce
  for (int first = 0; first < 4; first += 2) {
    const bool add_bias = first_of_window && (kPlaces == 1 || first == 0);
    uint32_t a[kM][4] = {};
#pragma unroll
    for (int m = 0; m < kM; ++m)
      for_outputs<float, kPlaces, 2>(
          at, m, first, [&](const GradPair<float>& grad, uint16_t codes, int output) {
            if (add_bias) add_bias_grads(grad, codes, bias[m]);
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
              for (int j = 0; j < 2; ++j)
                if (kPlaces > 1 || j == output)
                  a[m][2 * j + h] = code_of(codes, h) == (kPlaces > 1 ? place + first + j : 0)
                                        ? bits_as<uint32_t>(Math::rounded(grad.e[h]))
                                        : 0;
          });
    const int* const positions = at.positions + 4 * first + 2 * t;
    const unsigned char* const left = at.patch + positions[0] + 4 * g;
    const unsigned char* const right = at.patch + positions[1] + 4 * g;
#pragma unroll
    for (int j = 0; j < kUnits; ++j) {
      const uint32_t b0 = *reinterpret_cast<const uint32_t*>(left + columns.offset[j]);
      const uint32_t b1 = *reinterpret_cast<const uint32_t*>(right + columns.offset[j]);
#pragma unroll
      for (int m = 0; m < kM; ++m) Math::multiply(sums[m][j], a[m], b0, b1);
    }
  }
}

// With multiply-adds a thread's sums are of rows g and g + 8 and of columns 2 t and 2 t + 1, so
// that it goes over all 16 positions of the step; `at` is that of output 0.
template <int kPlaces, int kM, int kUnits>
__device__ void multiply_floats(const GradStep& at, int place, bool first_of_window,
                                const GradColumns<kUnits>& columns, float (&bias)[kM][2],
                                GradSums<kM, kUnits>& sums) {
  const int t = threadIdx.x % 4;
#pragma unroll 1
  for (int output = 0; output < (kPlaces > 1 ? 4 : kGradStep); ++output) {
    GradPair<float> grad[kM];
    uint16_t codes[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      grad[m] = load_pair<float>(at, output, m);
      codes[m] = load_codes(at, output, m);
      if (first_of_window && output % 4 == t) add_bias_grads(grad[m], codes[m], bias[m]);
    }
#pragma unroll 1
    for (int j = 0; j < (kPlaces > 1 ? 4 : 1); ++j) {
      const int lane = output % 4, nth = kPlaces > 1 ? j : output / 4;
      const int position = at.positions[nth / 2 * 8 + 2 * lane + nth % 2];
      float a[kM][2];
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          a[m][h] = code_of(codes[m], h) == (kPlaces > 1 ? place + j : 0) ? grad[m].e[h] : 0.0f;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        struct alignas(8) Pair {
          float e[2];
        };
        const auto b =
            *reinterpret_cast<const Pair*>(at.patch + position + columns.offset[u] + 8 * t);
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) sums[m][u][2 * h + e] += a[m][h] * b.e[e];
      }
    }
  }
}

template <typename Math, int kPlaces, int kM, int kUnits>
__device__ void multiply_step(const GradStep& at, int place, bool first_of_window,
                              const GradColumns<kUnits>& columns, float (&bias)[kM][2],
                              GradSums<kM, kUnits>& sums) {
  if constexpr (!Layout<Math>::kMatrixUnit)
    multiply_floats<kPlaces>(at, place, first_of_window, columns, bias, sums);
  else if constexpr (sizeof(typename Math::Element) == 2)
    multiply_halves<Math, kPlaces>(at, place, first_of_window, columns, bias, sums);
  else
    multiply_tf32<Math, kPlaces>(at, place, first_of_window, columns, bias, sums);
}

// ---- adding up

// The sums of the warps that took turns, in the first of them; `room` has a place for each thread
// of warps_n warps.
template <int kM, int kUnits>
__device__ void add_up_warps(const WeightGradPlan& p, int warp_k, int warp_n, float* room,
                             GradSums<kM, kUnits>& sums) {
  constexpr int kEach = kM * kUnits * 4;
  float* const own = room + warp_n * kEach * kWarpSize + threadIdx.x % kWarpSize;
  for (int turn = 1; turn < p.warps_k; ++turn) {
    __syncthreads();
    if (warp_k == turn)
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        own[i * kWarpSize] = sums[i / 4 / kUnits][i / 4 % kUnits][i % 4];
    __syncthreads();
    if (warp_k == 0)
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        sums[i / 4 / kUnits][i / 4 % kUnits][i % 4] += own[i * kWarpSize];
  }
  __syncthreads();
}

// The block's part of db, from the sums of the threads of warps with the first units.
template <int kM>
__device__ void store_bias_grad(const ConvBlockShape& s, const WeightGradPlan& p, int warp_k,
                                int warp_n, int k0, const float (&bias)[kM][2], float* room,
                                float* to) {
  const int lane = threadIdx.x % kWarpSize;
  __syncthreads();
  if (warp_n == 0)
    for (int m = 0; m < kM; ++m)
      for (int h = 0; h < 2; ++h)
        room[(warp_k * 4 + lane % 4) * kGradChannels + m * 16 + lane / 4 * 2 + h] = bias[m][h];
  __syncthreads();
  const int k = threadIdx.x;
  if (k >= kGradChannels || k0 + k >= s.K) return;
  float sum = 0;
  for (int i = 0; i < p.warps_k * 4; ++i) sum += room[i * kGradChannels + k];
  to[(k0 + k) * weight_grad_row(s) + weight_grad_elements(s) - 1] = sum;
}

// ---- the kernel

// Blocks that shall fit on a multiprocessor side by side: two, where registers allow it.
template <typename Math, int kPlaces, int kUnits>
constexpr int grad_blocks() {
  constexpr bool kScarce = Layout<Math>::kConfig.splits && kPlaces == 1 && kUnits == kGradUnits;
  return FASTCLS_SM80 && !kScarce ? 2 : 1;
}

// Windows of 1, up to 4 or up to kPlaces positions. Grid: x has the parts of the boxes, y the
// output channels, 32 at a time, and the chunks of input channels; kM fragments of the channels are
// multiplied. partial [parts, K, weight_grad_row]. Shared memory: two patches, gradients and codes
// of two boxes, positions, tables of the patch's pixels and the box's outputs; at the end room to
// add up.
template <typename Math, int kPlaces, int kM, int kUnits>
__global__ void __launch_bounds__(kGradThreads, grad_blocks<Math, kPlaces, kUnits>())
    weight_grad_kernel(ConvBlockShape s, WeightGradPlan p, InputSource<Math> input,
                       PooledGradSource<typename Math::Element> source, float* partial) {
  using T = typename Math::Element;
  const GemmTile& t = p.tile;
  if constexpr (!Layout<Math>::kRuns) return trap();
  DYNAMIC_SHARED(shared);
  const int outputs = p.steps / p.window_steps * (kPlaces > 1 ? 4 : kGradStep);
  unsigned char* const patches = shared;
  unsigned char* const grads = patches + 2 * t.patch_bytes;
  unsigned char* const codes = grads + 2 * outputs * kGradRow<T>;
  int* const positions = reinterpret_cast<int*>(codes + 2 * outputs * kGradCodeBytes);
  PatchEntry* const pixels = reinterpret_cast<PatchEntry*>(positions + p.steps * kGradStep);
  OutputEntry* const table = reinterpret_cast<OutputEntry*>(pixels + t.pixels);
  const int chunk = blockIdx.y % t.chunks;
  const int k0 = static_cast<int>(blockIdx.y / t.chunks) * kGradChannels;
  const int warp = threadIdx.x / kWarpSize, warp_n = warp % p.warps_n, warp_k = warp / p.warps_n;
  const int lane = threadIdx.x % kWarpSize, first_unit = warp_n * p.each_n;

  fill_positions(s, p, positions);
  input.fill_table(t, pixels);
  fill_outputs(s, t, source.g, outputs, table);
  __syncthreads();
  GradColumns<kUnits> columns;
  constexpr bool kPairs = sizeof(T) == 2;
#pragma unroll
  for (int j = 0; j < (kPairs ? (kUnits + 1) / 2 : kUnits); ++j) {
    const int unit = first_unit + (kPairs ? 2 * j + lane / 16 : j);
    columns.offset[j] = unit_offset(s, p, unit, sizeof(T));
  }

  // Box by box: the next one is on its way while this one is multiplied.
  const int boxes = static_cast<int>(t.boxes), each = (boxes + gridDim.x - 1) / gridDim.x;
  const int first = blockIdx.x * each, last = first + each < boxes ? first + each : boxes;
  GradSums<kM, kUnits> sums = {};
  float bias[kM][2] = {};
#pragma unroll 1
  for (int i = first - 1; i < last; ++i) {
    if (i + 1 < last) {
      const Box box = box_at(s, t, i + 1);
      const int slot = (i + 1 - first) % 2;
      source.load_grads(s, box, k0, outputs, table, grads + slot * outputs * kGradRow<T>);
      source.load_codes(s, box, k0, outputs, table, codes + slot * outputs * kGradCodeBytes);
      if (p.config.fold)
        input.template load_folded<true>(s, t, pixels, patches + slot * t.patch_bytes, box);
      else
        input.load_patch(s, t, pixels, patches + slot * t.patch_bytes, box, chunk);
    }
    copy_async_commit();
    if (i < first) continue;
    copy_async_wait<1>();
    __syncthreads();
    const int slot = (i - first) % 2;
    if (Math::kArithmetic == Arithmetic::kTf32 && !p.config.fold) {
      round_patch<Math>(patches + slot * t.patch_bytes, t.patch_bytes);
      __syncthreads();
    }
    const int own = Layout<Math>::kMatrixUnit ? lane % 4 : 0;  // output of a step
#pragma unroll 1
    for (int step = warp_k; step < p.steps; step += p.warps_k) {
      const int windows = kPlaces > 4 ? static_cast<int>(divide(step, p.by_window_steps)) : step;
      const int output = slot * outputs + windows * (kPlaces > 1 ? 4 : kGradStep) + own;
      const int place = kPlaces > 4 ? (step - windows * p.window_steps) * 4 : 0;
      const GradStep at{grads + output * kGradRow<T> + lane / 4 * 2 * static_cast<int>(sizeof(T)),
                        codes + output * kGradCodeBytes + lane / 4 * 2,
                        positions + step * kGradStep, patches + slot * t.patch_bytes};
      multiply_step<Math, kPlaces>(at, place, warp_n == 0 && place == 0, columns, bias, sums);
    }
    __syncthreads();
  }
  copy_async_wait<0>();

  // The block's part of the sums.
  const int64_t stride = weight_grad_row(s);
  float* const room = reinterpret_cast<float*>(shared);
  float* const to = partial + blockIdx.x * s.K * stride;
  if (chunk == 0) store_bias_grad(s, p, warp_k, warp_n, k0, bias, room, to);
  add_up_warps(p, warp_k, warp_n, room, sums);
  if (warp_k != 0) return;
  // A thread's two columns are neighbouring channels: four threads store a sector.
  const bool pairs = !p.config.fold && s.C % 2 == 0;
#pragma unroll
  for (int j = 0; j < kUnits; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (j >= p.each_n || (pairs && e == 1)) continue;
      const int64_t element = grad_element(s, p, first_unit + j, lane % 4 * 2 + e, chunk);
      if (element < 0) continue;
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int64_t k = k0 + m * 16 + lane / 4 * 2 + h;
          if (k >= s.K) continue;
          float* const at = to + k * stride + element;
          if (pairs)
            *reinterpret_cast<Vector<float, 2>*>(at) = {sums[m][j][2 * h], sums[m][j][2 * h + 1]};
          else
            *at = sums[m][j][2 * h + e];
        }
    }
}

template <typename Math, int kPlaces, int kM, int kUnits>
void launch_backward_weight(const Launcher& launch, const ConvBlockShape& s,
                            const WeightGradPlan& plan, const BackwardTensors& t,
                            const Tensor& partial) {
  using Element = typename Math::Element;
  launch.with_shared(plan.tile.shared_bytes, weight_grad_kernel<Math, kPlaces, kM, kUnits>,
                     dim3(plan.splits, plan.channel_blocks * plan.tile.chunks), kGradThreads, s,
                     plan, input_source<Math>(const_view<Element>(t.input), s.C),
                     pooled_grad_source<Element>(s, const_view<Element>(t.grad_out), t.codes),
                     static_cast<float*>(partial.mutable_data_ptr()));
}

}  // namespace

void launch_gemm_backward_weight(const Launcher& launch, const ConvBlockShape& s,
                                 const WeightGradPlan& plan, Arithmetic a,
                                 const BackwardTensors& t) {
  const Tensor partial =
      empty_flat({plan.splits, s.K, weight_grad_row(s)}, ScalarType::Float, t.input);
  dispatch_arithmetic(a, [&](auto math) {
    using Math = decltype(math);
    const auto run = [&](auto places, auto fragments) {
      constexpr int kPlaces = places, kM = fragments;
      if constexpr (kPlaces <= 4)
        if (plan.each_n <= kFewGradUnits)
          return launch_backward_weight<Math, kPlaces, kM, kFewGradUnits>(launch, s, plan, t,
                                                                          partial);
      launch_backward_weight<Math, kPlaces, kM, kGradUnits>(launch, s, plan, t, partial);
    };
    constexpr std::integral_constant<int, kGradFragments> all{};
    if (s.window() == 1)
      run(std::integral_constant<int, 1>{}, all);
    else if (s.window() > 4)
      run(std::integral_constant<int, kMostGradPlaces>{}, all);
    else if (s.K > 16)
      run(std::integral_constant<int, 4>{}, all);
    else
      run(std::integral_constant<int, 4>{}, std::integral_constant<int, 1>{});
  });
  launch_sum_chunks(launch, s, plan.splits, partial, t);
}

}  // namespace fastcls::cuda
