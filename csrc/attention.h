// What an attention kernel is told, on any device, and how its forms are made of it. The schemas are in
// metafast/ops/attention/library.py, the formulas and their names in metafast/ops/attention/README.md.
//
// Shapes: query [*lead, Hq, Nq, D], key [*lead, Hk, Nk, D], value [*lead, Hk, Nk, Dv], attn_mask [*lead, Hq, Nq, Nk] (bool
// or query's dtype; any dimension may be 1 instead), seeds int64 [*lead], key_ranges int64 [*lead, 2], statistics
// [*lead, Hq, Nq, 2] (the largest score of a row, and the log of the sum of exp(score - that); float32, or float64 with float64
// inputs). Query head h reads key head h / (Hq / Hk). Row i attends to columns i - left <= j <= i + right; either side may be
// negative, and one that is longer than any tensor (2^40) is no limit. Of the keys only those from the first number of
// key_ranges on exist, up to the second and without it; 0 <= first <= second <= Nk. Any strides; out and the gradients come in
// the memory order of what they are shaped like.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>

namespace metafast {

using torch::stable::Tensor;

// What all passes are told besides their tensors. The fields are in the order of the schemas, as are their types below; the
// same list in Python is metafast/ops/attention/options.py.
struct Options {
  std::optional<Tensor> attn_mask, seeds, key_ranges;
  int64_t left, right;
  double dropout_p, scale;
};

template <class...>
struct List;

using OptionTypes = List<
    const std::optional<Tensor>&, const std::optional<Tensor>&, const std::optional<Tensor>&, int64_t, int64_t, double, double>;

// An op is written once, as a function of the results that it is given, the options and its tensors, which returns the results.
// Where it is given none, it makes them.
template <size_t count>
using Results = std::array<Tensor, count>;
template <size_t count>
using Given = std::optional<Results<count>>;

// (out, statistics)
Results<2> attention_forward(
    const Given<2>& given, const Options& options, const Tensor& query, const Tensor& key, const Tensor& value);

// (grad_query, grad_key, grad_value)
Results<3> attention_backward(
    const Given<3>& given, const Options& options, const Tensor& grad_out, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& out, const Tensor& statistics);

// (tangent_out)
Results<1> attention_jvp(
    const Given<1>& given, const Options& options, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out, const Tensor& statistics, const Tensor& tangent_query, const Tensor& tangent_key,
    const Tensor& tangent_value, const std::optional<Tensor>& tangent_mask);

// (tangent_out, tangent_grad_query, tangent_grad_key, tangent_grad_value)
Results<4> attention_backward_jvp(
    const Given<4>& given, const Options& options, const Tensor& grad_out, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& out, const Tensor& statistics, const Tensor& tangent_query, const Tensor& tangent_key,
    const Tensor& tangent_value, const std::optional<Tensor>& tangent_mask, const std::optional<Tensor>& tangent_grad_out);

// The gradient of an additive attn_mask, of its shape: summed over what the mask is broadcast to.
Results<1> attention_mask_backward(
    const Given<1>& given, const Options& options, const Tensor& grad_out, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& out, const Tensor& statistics);

// The tangent of that gradient.
Results<1> attention_mask_backward_jvp(
    const Given<1>& given, const Options& options, const Tensor& grad_out, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& out, const Tensor& statistics, const Tensor& tangent_query, const Tensor& tangent_key,
    const Tensor& tangent_value, const std::optional<Tensor>& tangent_mask, const std::optional<Tensor>& tangent_grad_out);

// The forms of an op, as the dispatcher calls them: tensors, options, and for `out` the tensors that are written into.
template <auto op, class = decltype(op), class = OptionTypes>
struct Forms;

template <auto op, size_t count, class... Tensors, class... Option>
struct Forms<op, Results<count> (*)(const Given<count>&, const Options&, Tensors...), List<Option...>> {
  static auto made(Tensors... tensors, Option... option) {
    Results<count> results = op(std::nullopt, Options{option...}, tensors...);
    if constexpr (count == 1) return std::move(results[0]);
    else return std::tuple_cat(std::move(results));
  }

  template <size_t>
  using Each = const Tensor&;

  template <class>
  struct Out;

  template <size_t... number>
  struct Out<std::index_sequence<number...>> {
    static void call(Tensors... tensors, Option... option, Each<number>... given) {
      op(Results<count>{given...}, Options{option...}, tensors...);
    }
  };

  static constexpr auto out = &Out<std::make_index_sequence<count>>::call;
};

}  // namespace metafast
