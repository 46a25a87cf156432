// Updates of all parameters of all tasks: the plan that the kernels carry out, and how it is made of lists of tensors.
// rules.h has the formulas of each rule for one element, ops.h the ops, which make a plan of their arguments;
// csrc/cpu/task_update and csrc/cuda hold one `run<Rule>(plan)` each, for every rule.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <type_traits>
#include <vector>

namespace metafast::task_update {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// The arithmetic for elements stored as Stored, and a rule's coefficients in it.
template <class Stored>
using Arithmetic = std::conditional_t<std::is_same_v<Stored, double>, double, float>;
template <class Rule, class C>
using As = typename Rule::Options::template As<C>;

// Plans: an item for each parameter tensor, T tasks of n elements, all contiguous.

enum class From : uint8_t {
  number,     // `value`, for every element
  scalar,     // one element in memory, of a type of its own
  all_tasks,  // n elements that the tasks share
  each_task,  // T x n elements
};

// Of operands that are tensors: [T, *shape], [*shape] or either.
enum class Shape : uint8_t { each_task, all_tasks, either };

struct Input {
  From from = From::number;
  ScalarType scalar_type = ScalarType::Undefined;
  const void* data = nullptr;
  double value = 0;
};

enum class Keep : uint8_t {
  nothing,
  each_task,  // T x n elements
  task_sum,   // n elements, summed over tasks
  total,      // one number, summed over everything, possibly over items too: the plan's scalars[scalar]
};

struct Output {
  Keep keep = Keep::nothing;
  int32_t scalar = -1;
  void* data = nullptr;
  bool fresh = false;  // new memory, nothing was written there yet
};

struct Item {
  ScalarType type;
  int64_t tasks, elements;
  std::span<Input> in;    // of the rule's order, as are `out`
  std::span<Output> out;
};

struct Plan {
  int32_t device = -1;
  std::vector<Item> items;
  std::vector<Input> inputs;  // of all items, item by item, as are `outputs`
  std::vector<Output> outputs;
  Tensors scalars;
  Tensors copies;  // contiguous ones of operands that were not
};

struct Device {
  int32_t type = 0, index = -1;
  bool operator==(const Device&) const = default;
};

inline Device device_of(const Tensor& tensor) {
  Device device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device.type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device.index));
  return device;
}

inline Tensor empty(const int64_t* sizes, int64_t dim, ScalarType type, const Tensor& like) {
  std::array<int64_t, 64> strides;
  STD_TORCH_CHECK(dim <= int64_t(strides.size()), "task_update: expected at most 64 dimensions, got ", dim);
  int64_t stride = 1;
  for (int64_t d = dim; d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides[d] = stride;
  const int32_t stored = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  const Device device = device_of(like);
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides.data(), stored, device.type, device.index, &made));
  return Tensor(made);
}

// Makes a plan of lists of tensors, for a rule with so many inputs and outputs. Items take type and shape [T, *shape] from
// the tensors `like`. All that is not as it has to be is refused before anything is computed: Python only looks for the
// argument at fault once that has happened.
class Planner {
 public:
  Planner(const Tensors& like, size_t inputs, size_t outputs) : like_(like) {
    if (!like.empty()) device_ = device_of(like[0]);
    plan_.device = device_.index;
    plan_.items.resize(like.size());
    plan_.inputs.resize(like.size() * inputs);
    plan_.outputs.resize(like.size() * outputs);
    for (size_t i = 0; i < like.size(); ++i) {
      const auto sizes = like[i].sizes();
      STD_TORCH_CHECK(sizes.size() > 0 && sizes[0] == like[0].size(0),
                      "task_update: expected tensors whose first dimension is the task, as many in each");
      check_kind(like[i]);
      auto& item = plan_.items[i];
      item.type = like[i].scalar_type();
      item.tasks = sizes[0];
      item.elements = 1;
      for (size_t d = 1; d < sizes.size(); ++d) item.elements *= sizes[d];
      item.in = {&plan_.inputs[i * inputs], inputs};
      item.out = {&plan_.outputs[i * outputs], outputs};
    }
  }

  // Tensors of these shapes; an empty list leaves the operand zero.
  void read(int input, const Tensors& tensors, Shape shape = Shape::each_task) {
    if (tensors.empty()) return;
    check_count(tensors);
    for (size_t i = 0; i < tensors.size(); ++i) read_elements(i, input, tensors[i], shape);
  }

  // Rates: an empty list for the number, one for all items, or one an item; each of no dimensions or [*shape].
  void read_rate(int input, const Tensors& rates, double number) {
    if (rates.size() > 1) check_count(rates);
    for (size_t i = 0; i < plan_.items.size(); ++i) {
      if (rates.empty()) {
        plan_.items[i].in[input].value = number;
        continue;
      }
      const Tensor& rate = rates[rates.size() > 1 ? i : 0];
      STD_TORCH_CHECK(rate.dim() == 0 || rates.size() == plan_.items.size(),
                      "task_update: expected a rate for all tensors to have no dimensions");
      if (rate.dim() != 0) {
        read_elements(i, input, rate, Shape::all_tasks);
        continue;
      }
      check_kind(rate);
      plan_.items[i].in[input] = {From::scalar, rate.scalar_type(), rate.data_ptr(), 0};
    }
  }

  // Tensors [T, *shape]; [*shape], the sum over tasks, for the items that `shared` marks. New ones, or those of `over`:
  // nothing is returned then.
  Tensors write(int output, const Tensors* over = nullptr, const std::vector<bool>& shared = {}) {
    Tensors made;
    if (over) check_count(*over);
    else made.reserve(like_.size());
    for (size_t i = 0; i < like_.size(); ++i) {
      const bool sum = !shared.empty() && shared[i];
      if (over) {
        const Tensor& old = (*over)[i];
        STD_TORCH_CHECK(
            has_shape(old, i, sum ? Shape::all_tasks : Shape::each_task) && has_type(old, i) && old.is_contiguous(),
            "task_update: expected contiguous tensors of the gradients' shapes and types to write over");
      } else {
        const auto sizes = like_[i].sizes();
        made.push_back(empty(sizes.data() + sum, int64_t(sizes.size()) - sum, plan_.items[i].type, like_[i]));
      }
      void* const data = (over ? (*over)[i] : made[i]).data_ptr();
      plan_.items[i].out[output] = {sum ? Keep::task_sum : Keep::each_task, -1, data, !over};
    }
    return made;
  }

  // Tensors of the shapes of `rates`, new ones or those of `over`: the sums over all that uses an element of them.
  Tensors write_rate(int output, const Tensors& rates, const Tensors* over = nullptr) {
    STD_TORCH_CHECK(!over || over->size() == rates.size(), "task_update: expected as many tensors as there are rates");
    Tensors made;
    for (size_t r = 0; r < rates.size(); ++r) {
      const Tensor& rate = rates[r];
      if (!over) made.push_back(empty(rate.sizes().data(), rate.dim(), rate.scalar_type(), rate));
      const Tensor& sum = over ? (*over)[r] : made[r];
      const auto sizes = rate.sizes(), given = sum.sizes();
      STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), given.begin(), given.end()) && sum.is_contiguous() &&
                          sum.scalar_type() == rate.scalar_type() && device_of(sum) == device_,
                      "task_update: expected contiguous tensors of the rates' shapes and types to write over");
      const bool total = rate.dim() == 0;
      const Output out = {total ? Keep::total : Keep::task_sum, total ? int32_t(plan_.scalars.size()) : -1,
                          sum.data_ptr()};
      if (total) plan_.scalars.push_back(sum);
      if (rates.size() > 1) plan_.items[r].out[output] = out;
      else for (auto& item : plan_.items) item.out[output] = out;
    }
    return made;
  }

  // Where nothing is shared or summed over tasks, the tasks of an item are one long row. One task alone shares nothing.
  const Plan& finished() {
    for (auto& item : plan_.items) {
      bool rows = false;
      for (Input& in : item.in) {
        if (item.tasks == 1 && in.from == From::all_tasks) in.from = From::each_task;
        rows |= in.from == From::all_tasks;
      }
      for (Output& out : item.out) {
        if (item.tasks == 1 && out.keep == Keep::task_sum) out.keep = Keep::each_task;
        rows |= out.keep == Keep::task_sum;
      }
      if (rows) continue;
      item.elements *= item.tasks;
      item.tasks = 1;
    }
    return plan_;
  }

 private:
  const Tensors& like_;
  Device device_;
  Plan plan_;

  void check_count(const Tensors& tensors) const {
    STD_TORCH_CHECK(tensors.size() == plan_.items.size(), "task_update: expected ", plan_.items.size(),
                    " tensors, got ", tensors.size());
  }

  void check_kind(const Tensor& tensor) const {
    const ScalarType type = tensor.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
                        type == ScalarType::Half,
                    "task_update: no kernel for tensors of type ", torch::headeronly::toString(type));
    STD_TORCH_CHECK(device_of(tensor) == device_, "task_update: expected all tensors on one device");
  }

  bool has_type(const Tensor& tensor, size_t i) const {
    return tensor.scalar_type() == plan_.items[i].type && device_of(tensor) == device_;
  }

  bool has_shape(const Tensor& tensor, size_t i, Shape shape) const {
    const auto sizes = tensor.sizes(), like = like_[i].sizes();
    const bool batched = sizes.size() == like.size();
    if (shape == (batched ? Shape::all_tasks : Shape::each_task)) return false;
    return std::equal(sizes.begin(), sizes.end(), like.begin() + !batched, like.end());
  }

  void read_elements(size_t i, int input, Tensor tensor, Shape shape) {
    const auto& item = plan_.items[i];
    STD_TORCH_CHECK(has_shape(tensor, i, shape) && has_type(tensor, i),
                    "task_update: a tensor differs in shape, type or device from the gradient of its parameter");
    const bool batched = tensor.dim() == like_[i].dim();
    // A tensor that is expanded over tasks is read as the one row that it is.
    const bool expanded = batched && item.tasks > 1 && tensor.stride(0) == 0;
    if (expanded) tensor = torch::stable::select(tensor, 0, 0);
    if (!tensor.is_contiguous()) {
      tensor = torch::stable::contiguous(tensor);
      plan_.copies.push_back(tensor);
    }
    plan_.items[i].in[input] = {batched && !expanded ? From::each_task : From::all_tasks, item.type,
                                tensor.data_ptr(), 0};
  }
};

}  // namespace metafast::task_update
