// Updates of all parameters of all tasks: the formulas of each rule for one element, the plan that the kernels carry
// out, and the ops, which make a plan of their arguments. csrc/cpu and csrc/cuda hold one `run(plan)` each, for every
// rule. metafast/ops/task_update/README.md derives the formulas.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__CUDACC__)
#define METAFAST_ELEMENT __host__ __device__ __forceinline__
#else
#define METAFAST_ELEMENT inline __attribute__((always_inline))
#endif

namespace metafast::task_update {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Rules: `element` reads `inputs` numbers and makes `outputs` numbers of them.

// With g the gradient, its sign and weight decay included, and b the buffer, the new buffer is momentum b + kept g and
// the step is lr (from_buffer b + from_grad g). Without momentum, as at the first step with it, the new buffer would be
// g. All of this is arithmetic, without conditions, so that every compiler vectorises it.
struct Sgd {
  double sign, momentum, kept, from_buffer, from_grad;

  Sgd(double momentum, double dampening, bool nesterov, bool maximize, bool first)
      : sign(maximize ? -1 : 1), momentum(momentum), kept(first || momentum == 0 ? 1 : 1 - dampening),
        from_buffer(nesterov ? momentum * momentum : momentum), from_grad(nesterov ? 1 + momentum * kept : kept) {}

  template <class C>
  struct As {  // in the type of the arithmetic
    C sign, momentum, kept, from_buffer, from_grad;

    explicit As(const Sgd& rule)
        : sign(C(rule.sign)), momentum(C(rule.momentum)), kept(C(rule.kept)), from_buffer(C(rule.from_buffer)),
          from_grad(C(rule.from_grad)) {}
  };
};

struct SgdUpdate {
  using Options = Sgd;
  enum In { param, grad, buffer, lr, weight_decay, inputs };
  enum Out { new_param, new_buffer, outputs };

  template <class C>
  static METAFAST_ELEMENT void element(const Sgd::As<C>& rule, const C* in, C* out) {
    const C decayed = rule.sign * in[grad] + in[weight_decay] * in[param];
    out[new_param] = in[param] - in[lr] * (rule.from_buffer * in[buffer] + rule.from_grad * decayed);
    out[new_buffer] = rule.momentum * in[buffer] + rule.kept * decayed;
  }
};

// The vector-Jacobian product. The update is linear in parameter, gradient and buffer: only where a rate is learned
// does the product need them.
template <bool learned>
struct SgdVjp {
  using Options = Sgd;
  enum In { d_param, d_buffer, lr, weight_decay, param, grad, buffer };
  enum Out { to_param, to_grad, to_buffer, to_lr, to_weight_decay };
  static constexpr int inputs = learned ? 7 : 4, outputs = learned ? 5 : 3;

  template <class C>
  static METAFAST_ELEMENT void element(const Sgd::As<C>& rule, const C* in, C* out) {
    const C d_step = -in[lr] * in[d_param];
    const C d_decayed = rule.kept * in[d_buffer] + rule.from_grad * d_step;
    out[to_param] = in[d_param] + in[weight_decay] * d_decayed;
    out[to_grad] = rule.sign * d_decayed;
    out[to_buffer] = rule.momentum * in[d_buffer] + rule.from_buffer * d_step;
    if constexpr (learned) {
      const C decayed = rule.sign * in[grad] + in[weight_decay] * in[param];
      out[to_lr] = -in[d_param] * (rule.from_buffer * in[buffer] + rule.from_grad * decayed);
      out[to_weight_decay] = d_decayed * in[param];
    }
  }
};

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
};

template <class Rule>
struct Item {
  ScalarType type;
  int64_t tasks, elements;
  std::array<Input, Rule::inputs> in;
  std::array<Output, Rule::outputs> out;
};

template <class Rule>
struct Plan {
  int32_t device = -1;
  std::vector<Item<Rule>> items;
  Tensors scalars;
  Tensors copies;  // contiguous ones of operands that were not
};

inline Tensor empty(const int64_t* sizes, int64_t dim, ScalarType type, const Tensor& like) {
  std::array<int64_t, 64> strides;
  STD_TORCH_CHECK(dim <= int64_t(strides.size()), "task_update: expected at most 64 dimensions, got ", dim);
  int64_t stride = 1;
  for (int64_t d = dim; d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides[d] = stride;
  const int32_t stored = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides.data(), stored, device_type, device_index, &made));
  return Tensor(made);
}

// Makes a plan of lists of tensors. Items take type and shape [T, *shape] from the tensors `like`.
template <class Rule>
class Planner {
 public:
  explicit Planner(const Tensors& like) : like_(like) {
    if (!like.empty()) plan_.device = like[0].get_device_index();
    plan_.items.resize(like.size());
    for (size_t i = 0; i < like.size(); ++i) {
      const auto sizes = like[i].sizes();
      STD_TORCH_CHECK(sizes.size() > 0, "task_update: expected tensors whose first dimension is the task");
      auto& item = plan_.items[i];
      item.type = like[i].scalar_type();
      item.tasks = sizes[0];
      item.elements = 1;
      for (size_t d = 1; d < sizes.size(); ++d) item.elements *= sizes[d];
    }
  }

  // Tensors [T, *shape] or [*shape]; an empty list leaves the operand zero.
  void read(int input, const Tensors& tensors) {
    if (tensors.empty()) return;
    check_count(tensors);
    for (size_t i = 0; i < tensors.size(); ++i) read_elements(i, input, tensors[i]);
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
      if (rate.dim() != 0) read_elements(i, input, rate);
      else plan_.items[i].in[input] = {From::scalar, rate.scalar_type(), rate.data_ptr(), 0};
    }
  }

  // New tensors [T, *shape]; [*shape], the sum over tasks, for the items that `shared` marks.
  Tensors write(int output, const std::vector<bool>& shared = {}) {
    Tensors made;
    made.reserve(like_.size());
    for (size_t i = 0; i < like_.size(); ++i) {
      const bool sum = !shared.empty() && shared[i];
      const auto sizes = like_[i].sizes();
      made.push_back(empty(sizes.data() + sum, int64_t(sizes.size()) - sum, plan_.items[i].type, like_[i]));
      plan_.items[i].out[output] = {sum ? Keep::task_sum : Keep::each_task, -1, made.back().data_ptr()};
    }
    return made;
  }

  // New tensors of the shapes of `rates`: the sums over all that uses an element of them.
  Tensors write_rate(int output, const Tensors& rates) {
    Tensors made;
    made.reserve(rates.size());
    for (size_t r = 0; r < rates.size(); ++r) {
      const bool total = rates[r].dim() == 0;
      made.push_back(empty(rates[r].sizes().data(), rates[r].dim(), rates[r].scalar_type(), rates[r]));
      const Output out = {total ? Keep::total : Keep::task_sum, total ? int32_t(plan_.scalars.size()) : -1,
                          made[r].data_ptr()};
      if (total) plan_.scalars.push_back(made[r]);
      if (rates.size() > 1) plan_.items[r].out[output] = out;
      else for (auto& item : plan_.items) item.out[output] = out;
    }
    return made;
  }

  // Where nothing is shared or summed over tasks, the tasks of an item are one long row.
  const Plan<Rule>& finished() {
    for (auto& item : plan_.items) {
      bool rows = false;
      for (const Input& in : item.in) rows |= in.from == From::all_tasks;
      for (const Output& out : item.out) rows |= out.keep == Keep::task_sum;
      if (rows) continue;
      item.elements *= item.tasks;
      item.tasks = 1;
    }
    return plan_;
  }

 private:
  const Tensors& like_;
  Plan<Rule> plan_;

  void check_count(const Tensors& tensors) const {
    STD_TORCH_CHECK(tensors.size() == plan_.items.size(), "task_update: expected ", plan_.items.size(),
                    " tensors, got ", tensors.size());
  }

  void read_elements(size_t i, int input, Tensor tensor) {
    const auto& item = plan_.items[i];
    const bool batched = tensor.dim() == like_[i].dim();
    STD_TORCH_CHECK(tensor.numel() == item.elements * (batched ? item.tasks : 1) &&
                        tensor.scalar_type() == item.type,
                    "task_update: a tensor differs in size or type from the gradient of its parameter");
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

// Ops. Their schemas, and what the arguments are, are in metafast/ops/task_update/library.py.

template <class Device>
std::tuple<Tensors, Tensors> sgd_update(
    const Tensors& params, const Tensors& grads, const Tensors& buffers, const Tensors& lrs, const Tensors& decays,
    double lr, double momentum, double dampening, bool nesterov, double weight_decay, bool maximize) {
  using Rule = SgdUpdate;
  Planner<Rule> planner(grads);
  planner.read(Rule::param, params);
  planner.read(Rule::grad, grads);
  planner.read(Rule::buffer, buffers);
  planner.read_rate(Rule::lr, lrs, lr);
  planner.read_rate(Rule::weight_decay, decays, weight_decay);
  Tensors new_params = planner.write(Rule::new_param);
  Tensors new_buffers = momentum != 0 ? planner.write(Rule::new_buffer) : Tensors();
  Device::run(planner.finished(), Sgd(momentum, dampening, nesterov, maximize, buffers.empty()));
  return {std::move(new_params), std::move(new_buffers)};
}

template <class Device, bool learned>
std::tuple<Tensors, Tensors, Tensors, Tensors, Tensors> sgd_update_vjp_of(
    const Tensors& d_params, const Tensors& d_buffers, const Tensors& params, const Tensors& grads,
    const Tensors& buffers, const Tensors& lrs, const Tensors& decays, double lr, double weight_decay, const Sgd& rule,
    const std::vector<bool>& shared, const std::vector<bool>& needed) {
  using Rule = SgdVjp<learned>;
  Planner<Rule> planner(d_params);
  planner.read(Rule::d_param, d_params);
  planner.read(Rule::d_buffer, d_buffers);
  planner.read_rate(Rule::lr, lrs, lr);
  planner.read_rate(Rule::weight_decay, decays, weight_decay);
  if constexpr (learned) {
    planner.read(Rule::param, params);
    planner.read(Rule::grad, grads);
    planner.read(Rule::buffer, buffers);
  }
  std::array<Tensors, 5> made;
  if (needed[0]) made[0] = planner.write(Rule::to_param, shared);
  if (needed[1]) made[1] = planner.write(Rule::to_grad);
  if (needed[2]) made[2] = planner.write(Rule::to_buffer);
  if constexpr (learned) {
    if (needed[3]) made[3] = planner.write_rate(Rule::to_lr, lrs);
    if (needed[4]) made[4] = planner.write_rate(Rule::to_weight_decay, decays);
  }
  Device::run(planner.finished(), rule);
  return {std::move(made[0]), std::move(made[1]), std::move(made[2]), std::move(made[3]), std::move(made[4])};
}

template <class Device>
std::tuple<Tensors, Tensors, Tensors, Tensors, Tensors> sgd_update_vjp(
    const Tensors& d_params, const Tensors& d_buffers, const Tensors& params, const Tensors& grads,
    const Tensors& buffers, const Tensors& lrs, const Tensors& decays, double lr, double momentum, double dampening,
    bool nesterov, double weight_decay, bool maximize, bool first, const std::vector<bool>& shared,
    const std::vector<bool>& needed) {
  STD_TORCH_CHECK(shared.size() == d_params.size() && needed.size() == 5,
                  "sgd_update_vjp: expected shared for each parameter and needed for each of five groups");
  const Sgd rule(momentum, dampening, nesterov, maximize, first);
  const auto product = needed[3] || needed[4] ? &sgd_update_vjp_of<Device, true> : &sgd_update_vjp_of<Device, false>;
  return product(d_params, d_buffers, params, grads, buffers, lrs, decays, lr, weight_decay, rule, shared, needed);
}

}  // namespace metafast::task_update
