// The gradient of an additive mask, and the tangent of that gradient, on the CPU: dS, or its tangent, summed over whatever the
// mask is broadcast to, without storing more of it than the mask has. The scores are made again, by the same panels, so a mask
// that needs no gradient costs nothing.

#include "attention.h"

#include <torch/csrc/stable/library.h>

#include <numeric>

#include "cpu/attention/call.h"
#include "cpu/attention/scores.h"

namespace metafast {
namespace {

// Which batches and heads read each matrix of the mask.
struct Readers {
  Readers(const Tensor& mask, const std::vector<int64_t>& lead, int64_t batches, int64_t heads) {
    const int64_t rank = mask.dim(), mask_heads = mask.size(rank - 3);
    int64_t matrices = mask_heads;
    for (int64_t i = 0; i < rank - 3; ++i) matrices *= mask.size(i);
    of_matrix.resize(size_t(matrices));
    for (int64_t batch = 0; batch < batches; ++batch) {
      int64_t rest = batch, mask_batch = 0, step = 1;
      for (int64_t i = rank - 3; i-- > 0;) {
        if (mask.size(i) > 1) mask_batch += rest % lead[size_t(i)] * step;
        step *= mask.size(i);
        rest /= lead[size_t(i)];
      }
      for (int64_t head = 0; head < heads; ++head) {
        of_matrix[size_t(mask_batch * mask_heads + (mask_heads > 1 ? head : 0))].emplace_back(batch, head);
      }
    }
  }

  std::vector<std::vector<std::pair<int64_t, int64_t>>> of_matrix;
};

// Adds all rows of a panel to its first, two and two: the error of a sum of many grows with their logarithm.
template <typename T>
void sum_rows(T* x, const Panel& panel, int64_t stride) {
  for (int64_t step = 1; step < panel.count; step *= 2) {
    for (int64_t i = 0; i + step < panel.count; i += 2 * step) {
      for (int64_t c = 0; c < panel.columns(); ++c) x[i * stride + c] += x[(i + step) * stride + c];
    }
  }
}

// sum (contiguous, shaped like the mask) = the sums of what gradients(panel, scratch) returns a panel of. A thread has rows of
// the mask to itself and adds to them in a fixed order.
template <typename T, typename Gradients>
void sum_to_mask(const Problem<T>& problem, const Tensor& mask, T* sum, int64_t buffers, const std::vector<Packed<T>>& keys, Gradients gradients) {
  const Readers readers(mask, problem.lead, problem.batches, problem.heads);
  const int64_t mask_rows = mask.size(mask.dim() - 2), mask_columns = mask.size(mask.dim() - 1);
  const int64_t height = panel_rows(problem, buffers), panels = (problem.rows + height - 1) / height;
  // Where all rows read one, they are one thread's.
  const int64_t together = mask_rows == 1 ? panels : 1, matrices = int64_t(readers.of_matrix.size());
  torch::stable::parallel_for(0, matrices * (panels / std::max<int64_t>(together, 1)), 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(problem, buffers, height, keys);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t matrix = unit * together / panels, first_panel = unit * together % panels;
      T* of_matrix = sum + matrix * mask_rows * mask_columns;
      for (const auto& [batch, head] : readers.of_matrix[size_t(matrix)]) {
        for (int64_t j = first_panel; j < first_panel + together; ++j) {
          const int64_t first = j * height;
          Panel panel{batch, head, first, std::min(height, problem.rows - first), 0, 0};
          trim(problem, panel);
          if (panel.columns() == 0) continue;
          scratch.move_to(batch, head / problem.group());
          T* gradient = gradients(panel, scratch);
          if (mask_rows == 1) sum_rows(gradient, panel, scratch.stride);
          const int64_t distinct = mask_rows == 1 ? 1 : panel.count;
          for (int64_t i = 0; i < distinct; ++i) {
            const T* from = gradient + i * scratch.stride;
            T* to = of_matrix + (mask_rows == 1 ? 0 : first + i) * mask_columns;
            if (mask_columns == 1) to[0] += std::accumulate(from, from + panel.columns(), T(0));
            else for (int64_t c = 0; c < panel.columns(); ++c) to[panel.begin + c] += from[c];
          }
        }
      }
    }
  });
}

// Where the gradient of a mask is summed: contiguous, of a type that is computed in, zero.
Output sums_for(const Tensor& given) {
  const Output sums(given, torch::stable::contiguous(as_read(given)));
  Tensor zeros = sums.tensor;
  torch::stable::zero_(zeros);
  return sums;
}

Tensor gradient_like(const Tensor& mask) {
  return torch::stable::new_empty(mask, std::vector<int64_t>(mask.sizes().begin(), mask.sizes().end()));
}

}  // namespace

Results<1> attention_mask_backward(
    const Given<1>& given, const Options& options, const Tensor& grad_out_, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor&, const Tensor& statistics_) {
  Results<1> results = given ? *given : Results<1>{gradient_like(*options.attn_mask)};
  const Call call(query, key, value, options);
  const Tensor grad_out = rows_as_read(grad_out_), statistics = torch::stable::contiguous(statistics_);
  const Output sums = sums_for(results[0]);
  call.with_problem([&](const auto& problem) {
    using T = typename std::decay_t<decltype(problem)>::Element;
    const Matrices<const T> g(grad_out, problem.lead);
    const std::vector<Packed<T>> keys{{&problem.k, problem.depth, in_blocks}, {&problem.v, problem.value_depth, in_blocks}};
    sum_to_mask(problem, *options.attn_mask, static_cast<T*>(sums.tensor.data_ptr()), 2, keys, [&](const Panel& panel, const Scratch<T>& scratch) {
      score_gradients(problem, panel, data<T>(statistics), rows_of(g, panel), scratch);
      return scratch[gradients];
    });
  });
  sums.give();
  return results;
}

Results<1> attention_mask_backward_jvp(
    const Given<1>& given, const Options& options, const Tensor& grad_out_, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor&, const Tensor& statistics_, const Tensor& tangent_query, const Tensor& tangent_key,
    const Tensor& tangent_value, const std::optional<Tensor>& tangent_mask, const std::optional<Tensor>& tangent_grad_out_) {
  Results<1> results = given ? *given : Results<1>{gradient_like(*options.attn_mask)};
  const Call call(query, key, value, options);
  const TangentTensors tangents(tangent_query, tangent_key, tangent_value, tangent_mask);
  const Tensor grad_out = rows_as_read(grad_out_), statistics = torch::stable::contiguous(statistics_);
  const std::optional<Tensor> tangent_grad_out = rows_as_read(tangent_grad_out_);
  const Output sums = sums_for(results[0]);
  call.with_problem([&](const auto& problem) {
    using T = typename std::decay_t<decltype(problem)>::Element;
    const Matrices<const T> g(grad_out, problem.lead);
    std::optional<Matrices<const T>> tangent_g;
    if (tangent_grad_out) tangent_g.emplace(*tangent_grad_out, problem.lead);
    const Tangents<T> tangent = tangents.read<T>(problem);
    const std::vector<Packed<T>> keys{{&problem.k, problem.depth, in_blocks}, {&problem.v, problem.value_depth, in_blocks},
                                      {&tangent.k, problem.depth, in_blocks}, {&tangent.v, problem.value_depth, in_blocks}};
    sum_to_mask(problem, *options.attn_mask, static_cast<T*>(sums.tensor.data_ptr()), 4, keys, [&](const Panel& panel, const Scratch<T>& scratch) {
      std::optional<Operand<const T>> tangent_g_rows;
      if (tangent_g) tangent_g_rows = rows_of(*tangent_g, panel);
      tangent_score_gradients(problem, tangent, panel, data<T>(statistics), rows_of(g, panel), tangent_g_rows, scratch);
      return scratch[tangent_gradients];
    });
  });
  sums.give();
  return results;
}

}  // namespace metafast

STABLE_TORCH_LIBRARY_IMPL(metafast, CPU, library) {
  using namespace metafast;
  library.impl("attention_mask_backward", TORCH_BOX(&Forms<&attention_mask_backward>::made));
  library.impl("attention_mask_backward.out", TORCH_BOX(Forms<&attention_mask_backward>::out));
  library.impl("attention_mask_backward_jvp", TORCH_BOX(&Forms<&attention_mask_backward_jvp>::made));
  library.impl("attention_mask_backward_jvp.out", TORCH_BOX(Forms<&attention_mask_backward_jvp>::out));
}
