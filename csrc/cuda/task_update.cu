// Task updates on CUDA: one launch for all items of a type, hundreds of them in a table that is passed by value, so
// that nothing is copied to the device and the launch can be captured in a graph. A block takes a range of elements of
// one item through all its tasks: what the tasks share is read once, and what is summed over tasks is summed in order.
// Totals are summed in a second launch, in the order of the blocks. Nothing is atomic: every run gives the same result.

#include "task_update/ops.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cuda_runtime.h>

#include <limits>

namespace metafast::task_update {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // of 16 bytes, for each thread

// Kernel arguments may take 32764 bytes since CUDA 12.1 and driver 530, on every device from compute capability 7.0:
// room for a table of hundreds of items.
constexpr int kTableBytes = 31744;

template <class Rule>
struct Entry {
  const void* in[Rule::inputs];
  void* out[Rule::outputs];
  int64_t tasks, elements;
  int32_t first_block;
  bool aligned;  // every row starts at a multiple of 16 bytes
  From from[Rule::inputs];
  Keep keep[Rule::outputs];
  ScalarType scalar_type[Rule::inputs];
};

template <class Rule>
struct Table {
  static constexpr int capacity = (kTableBytes - int(sizeof(double)) * (Rule::inputs + 1)) / int(sizeof(Entry<Rule>));
  double numbers[Rule::inputs];  // of the operands that are numbers
  int32_t size;
  Entry<Rule> entries[capacity];
};

template <class Stored>
struct alignas(16) Pack {
  static constexpr int lanes = 16 / sizeof(Stored);
  Stored value[lanes];
};

__device__ double load_scalar(const void* from, ScalarType type) {
  switch (type) {
    case ScalarType::Double: return *static_cast<const double*>(from);
    case ScalarType::Float: return *static_cast<const float*>(from);
    case ScalarType::BFloat16: return static_cast<float>(*static_cast<const c10::BFloat16*>(from));
    default: return static_cast<float>(*static_cast<const c10::Half*>(from));
  }
}

__device__ void store_scalar(void* to, ScalarType type, double value) {
  switch (type) {
    case ScalarType::Double: *static_cast<double*>(to) = value; break;
    case ScalarType::Float: *static_cast<float*>(to) = static_cast<float>(value); break;
    case ScalarType::BFloat16: *static_cast<c10::BFloat16*>(to) = static_cast<float>(value); break;
    default: *static_cast<c10::Half*>(to) = static_cast<float>(value);
  }
}

// The sum over the threads of a block, in the first thread, always added in the same order.
__device__ double block_sum(double value) {
  __shared__ double warps[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  __syncthreads();  // the sum before this one has been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0)
    for (double warp : warps) sum += warp;
  return sum;
}

template <class Rule, class Stored>
__global__ void __launch_bounds__(kThreads)
    update(const __grid_constant__ Table<Rule> table, const As<Rule, Arithmetic<Stored>> rule, double* totals) {
  using C = Arithmetic<Stored>;
  using Vector = Pack<Stored>;
  constexpr int lanes = Vector::lanes;

  int low = 0;
  for (int high = table.size - 1; low < high;) {
    const int middle = (low + high + 1) / 2;
    if (table.entries[middle].first_block <= int(blockIdx.x)) low = middle;
    else high = middle - 1;
  }
  const Entry<Rule>& item = table.entries[low];

  C in[lanes][Rule::inputs], out[lanes][Rule::outputs], sums[lanes][Rule::outputs];
  double total[Rule::outputs] = {};
#pragma unroll
  for (int i = 0; i < Rule::inputs; ++i) {
    C value = static_cast<C>(table.numbers[i]);
    if (item.from[i] == From::scalar) value = static_cast<C>(load_scalar(item.in[i], item.scalar_type[i]));
#pragma unroll
    for (int lane = 0; lane < lanes; ++lane) in[lane][i] = value;
  }

  const int64_t first = int64_t(int(blockIdx.x) - item.first_block) * (kThreads * kVectors * lanes);
  for (int vector = 0; vector < kVectors; ++vector) {
    const int64_t e = first + int64_t(vector * kThreads + threadIdx.x) * lanes;
    if (e >= item.elements) break;
    const int here = item.elements - e < lanes ? int(item.elements - e) : lanes;
    const bool whole = item.aligned && here == lanes;

    const auto load = [&](int i, int64_t task) {
      const Stored* from = static_cast<const Stored*>(item.in[i]) + task * item.elements + e;
      if (whole) {
        const Vector pack = *reinterpret_cast<const Vector*>(from);
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane) in[lane][i] = static_cast<C>(pack.value[lane]);
      } else {
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane)
          if (lane < here) in[lane][i] = static_cast<C>(from[lane]);
      }
    };
    const auto store = [&](int o, int64_t task, const C(&values)[lanes][Rule::outputs]) {
      Stored* to = static_cast<Stored*>(item.out[o]) + task * item.elements + e;
      if (whole) {
        Vector pack;
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane) pack.value[lane] = static_cast<Stored>(values[lane][o]);
        *reinterpret_cast<Vector*>(to) = pack;
      } else {
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane)
          if (lane < here) to[lane] = static_cast<Stored>(values[lane][o]);
      }
    };

#pragma unroll
    for (int i = 0; i < Rule::inputs; ++i)
      if (item.from[i] == From::all_tasks) load(i, 0);
#pragma unroll
    for (int lane = 0; lane < lanes; ++lane)
#pragma unroll
      for (int o = 0; o < Rule::outputs; ++o) sums[lane][o] = 0;

    for (int64_t task = 0; task < item.tasks; ++task) {
#pragma unroll
      for (int i = 0; i < Rule::inputs; ++i)
        if (item.from[i] == From::each_task) load(i, task);
#pragma unroll
      for (int lane = 0; lane < lanes; ++lane) Rule::element(rule, in[lane], out[lane]);
#pragma unroll
      for (int o = 0; o < Rule::outputs; ++o) {
        if (item.keep[o] == Keep::each_task) {
          store(o, task, out);
        } else if (item.keep[o] != Keep::nothing) {
#pragma unroll
          for (int lane = 0; lane < lanes; ++lane)
            if (lane < here) {
              if (item.keep[o] == Keep::total) total[o] += out[lane][o];
              else sums[lane][o] += out[lane][o];
            }
        }
      }
    }
#pragma unroll
    for (int o = 0; o < Rule::outputs; ++o)
      if (item.keep[o] == Keep::task_sum) store(o, 0, sums);
  }

#pragma unroll
  for (int o = 0; o < Rule::outputs; ++o) {
    if (item.keep[o] != Keep::total) continue;
    const double sum = block_sum(total[o]);
    if (threadIdx.x == 0) totals[int64_t(blockIdx.x) * Rule::outputs + o] = sum;
  }
}

// A total, and the blocks whose sums make it up: totals[first], totals[first + stride], ... before totals[end].
struct Total {
  void* data;
  int64_t first, end;
  ScalarType type;
};

struct Totals {
  static constexpr int capacity = kTableBytes / int(sizeof(Total));
  Total entries[capacity];
};

__global__ void __launch_bounds__(kThreads)
    add_totals(const __grid_constant__ Totals table, const double* totals, int stride) {
  const Total& total = table.entries[blockIdx.x];
  double sum = 0;
  for (int64_t at = total.first + int64_t(threadIdx.x) * stride; at < total.end; at += int64_t(kThreads) * stride)
    sum += totals[at];
  sum = block_sum(sum);
  if (threadIdx.x == 0) store_scalar(total.data, total.type, sum);
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "task_update: ", cudaGetErrorString(error));
}

int64_t lanes_of(ScalarType type) {
  return type == ScalarType::Double ? 2 : type == ScalarType::Float ? 4 : 8;
}

int64_t block_count(const Item& item) {
  const int64_t length = kThreads * kVectors * lanes_of(item.type);
  return (item.elements + length - 1) / length;
}

bool is_aligned(const Item& item) {
  bool aligned = item.tasks == 1 || item.elements % lanes_of(item.type) == 0;
  for (const Input& in : item.in)
    if (in.from >= From::all_tasks) aligned &= reinterpret_cast<uintptr_t>(in.data) % 16 == 0;
  for (const Output& out : item.out)
    if (out.keep == Keep::each_task || out.keep == Keep::task_sum)
      aligned &= reinterpret_cast<uintptr_t>(out.data) % 16 == 0;
  return aligned;
}

// Launches for items that are all stored as Stored: one, or as many as tables are needed.
template <class Rule, class Stored>
void launch(const std::vector<const Item*>& items, const typename Rule::Options& options, double* totals,
            cudaStream_t stream) {
  const As<Rule, Arithmetic<Stored>> rule(options);
  for (size_t next = 0; next < items.size();) {
    Table<Rule> table{};
    int64_t blocks = 0;
    for (; next < items.size() && table.size < table.capacity; ++next) {
      const Item& item = *items[next];
      Entry<Rule>& entry = table.entries[table.size++];
      entry.tasks = item.tasks;
      entry.elements = item.elements;
      entry.first_block = int32_t(blocks);
      entry.aligned = is_aligned(item);
      for (int i = 0; i < Rule::inputs; ++i) {
        entry.in[i] = item.in[i].data;
        entry.from[i] = item.in[i].from;
        entry.scalar_type[i] = item.in[i].scalar_type;
        table.numbers[i] = item.in[i].value;  // a number is the same for all items
      }
      for (int o = 0; o < Rule::outputs; ++o) {
        entry.out[o] = item.out[o].data;
        entry.keep[o] = item.out[o].keep;
      }
      blocks += block_count(item);
      STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "task_update: too many elements for one call");
    }
    update<Rule, Stored><<<unsigned(blocks), kThreads, 0, stream>>>(table, rule, totals);
    check_launch();
    if (totals) totals += blocks * Rule::outputs;
  }
}

struct Cuda {
  template <class Rule>
  static void run(const Plan& plan, const typename Rule::Options& options) {
    const torch::stable::accelerator::DeviceGuard guard(plan.device);
    void* handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(plan.device, &handle));
    const cudaStream_t stream = static_cast<cudaStream_t>(handle);

    // Blocks are numbered through the launches, a type after the other; a total is the sum of a range of them.
    constexpr std::array types = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half};
    std::array<std::vector<const Item*>, types.size()> items;
    std::array<int64_t, types.size()> first_block{};
    std::vector<Total> scalars;
    for (const Tensor& scalar : plan.scalars)
      scalars.push_back({scalar.data_ptr(), std::numeric_limits<int64_t>::max(), 0, scalar.scalar_type()});
    int64_t blocks = 0;
    for (size_t t = 0; t < types.size(); ++t) {
      first_block[t] = blocks;
      for (const Item& item : plan.items) {
        if (item.type != types[t] || item.elements == 0) continue;
        items[t].push_back(&item);
        const int64_t begin = blocks;
        blocks += block_count(item);
        for (int o = 0; o < Rule::outputs; ++o) {
          if (item.out[o].keep != Keep::total) continue;
          Total& total = scalars[item.out[o].scalar];
          total.first = std::min(total.first, begin * Rule::outputs + o);
          total.end = blocks * Rule::outputs;
        }
      }
    }

    Tensor workspace;
    double* totals = nullptr;
    if (!scalars.empty()) {
      const int64_t size = blocks * Rule::outputs;
      workspace = empty(&size, 1, ScalarType::Double, plan.scalars[0]);
      totals = static_cast<double*>(workspace.data_ptr());
    }
    const auto part = [&](size_t t) { return totals ? totals + first_block[t] * Rule::outputs : nullptr; };
    launch<Rule, float>(items[0], options, part(0), stream);
    launch<Rule, double>(items[1], options, part(1), stream);
    launch<Rule, c10::BFloat16>(items[2], options, part(2), stream);
    launch<Rule, c10::Half>(items[3], options, part(3), stream);

    for (size_t next = 0; next < scalars.size(); next += Totals::capacity) {
      Totals table{};
      const size_t count = std::min(scalars.size() - next, size_t(Totals::capacity));
      std::copy_n(scalars.begin() + next, count, table.entries);
      add_totals<<<unsigned(count), kThreads, 0, stream>>>(table, totals, Rule::outputs);
      check_launch();
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metafast, CUDA, m) {
  register_kernels<Cuda>(m);
}

}  // namespace metafast::task_update
