// Sums of matrix products of several tasks on the CPU: what linear layers and their derivatives are made of. Formulas in
// metafast/ops/layers/README.md.
//
// A BLAS adds nothing but its own result to a matrix, and packs for any size; here a product starts from what it is added to, the
// right factor is laid out a part at a time, and the left one is read where it lies.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/aligned_memory.h"
#include "cpu/isa/capability.h"
#include "cpu/output.h"

#define METAFAST_VARIANT "cpu/gemm/tasks.inl"

namespace metafast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

namespace {

// left [rows, depth] times right [depth, columns]: how far apart rows and columns are. Those of left are consecutive elements.
template <typename T>
struct Term {
  const T* left;
  int64_t left_row;
  const T* right;
  int64_t right_row, right_column, depth;
};

template <typename T>
struct TaskProducts {
  using Element = T;
  // Elements of `packed`.
  int64_t packed_size;
  // to = from + sum of left right, row by row; from may be to, its rows may be one and the same (from_row 0), or null for 0.
  void (*sum_of_products)(int64_t rows, int64_t columns, int64_t terms, const Term<T>* factors, const T* from, int64_t from_row, T* to,
                          int64_t to_row, T* packed);
};

#include "cpu/isa/per_type_and_isa.inl"

// Multiply-adds that are worth a thread's start.
constexpr int64_t worth_a_thread = 1 << 18;

Tensor with_plain_rows(const Tensor& tensor) {
  return tensor.size(2) <= 1 || tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor);
}

template <typename T>
T* matrix_of(const Tensor& tensor, int64_t task) {
  return static_cast<T*>(tensor.data_ptr()) + task * tensor.stride(0);
}

template <typename T>
void run(const TaskProducts<T>& kernels, const std::optional<Tensor>& start, const Tensors& lefts, const Tensors& rights, const Tensor& out) {
  const int64_t tasks = out.size(0), rows = out.size(1), columns = out.size(2);
  int64_t depth = 0;
  for (const Tensor& left : lefts) depth += left.size(2);
  const int64_t threads = torch::stable::get_num_threads(), work = rows * columns * std::max<int64_t>(depth, 1);
  // A task's rows are shared out, in as few pieces as leave no thread idle: each lays the right factors out anew.
  const int64_t pieces = work < worth_a_thread ? 1 : std::min(threads / std::gcd(tasks, threads), (rows + 5) / 6);
  const int64_t fewest = std::max<int64_t>(1, worth_a_thread * pieces / std::max<int64_t>(work, 1));
  torch::stable::parallel_for(0, tasks * pieces, fewest, [&](int64_t begin, int64_t end) {
    const auto packed = aligned_memory<T>(kernels.packed_size);
    std::vector<Term<T>> terms;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t task = i / pieces, first = i % pieces * rows / pieces, last = (i % pieces + 1) * rows / pieces;
      terms.clear();
      for (size_t t = 0; t < lefts.size(); ++t) {
        const Tensor &left = lefts[t], &right = rights[t];
        if (left.size(2) == 0) continue;
        terms.push_back({matrix_of<const T>(left, task) + first * left.stride(1), left.stride(1), matrix_of<const T>(right, task),
                         right.stride(1), right.stride(2), left.size(2)});
      }
      T* to = matrix_of<T>(out, task) + first * out.stride(1);
      const int64_t from_row = start && start->size(1) > 1 ? start->stride(1) : 0;
      const T* from = start ? matrix_of<const T>(*start, task) + first * from_row : nullptr;
      if (terms.empty()) {
        for (int64_t r = 0; r < last - first; ++r) {
          if (from) std::copy_n(from + r * from_row, columns, to + r * out.stride(1));
          else std::fill_n(to + r * out.stride(1), columns, T(0));
        }
      } else {
        kernels.sum_of_products(last - first, columns, int64_t(terms.size()), terms.data(), from, from_row, to, out.stride(1), packed.get());
      }
    }
  });
}

void check(bool right, const char* what) {
  if (!right) throw std::runtime_error(std::string("metafast sum_of_products (CPU): ") + what);
}

void sum_of_products_out(const std::optional<Tensor>& start_, const Tensors& lefts_, const Tensors& rights, const Tensor& out_) {
  check(lefts_.size() == rights.size() && !lefts_.empty(), "expected as many left as right factors, at least one");
  check(out_.dim() == 3, "expected a result [tasks, rows, columns]");
  const Output given(out_, with_plain_rows(out_));
  const Tensor& out = given.tensor;
  Tensors lefts;
  for (size_t t = 0; t < rights.size(); ++t) {
    const Tensor &left = lefts_[t], &right = rights[t];
    check(left.dim() == 3 && right.dim() == 3 && left.size(0) == out.size(0) && right.size(0) == out.size(0) &&
              left.size(1) == out.size(1) && left.size(2) == right.size(1) && right.size(2) == out.size(2),
          "expected factors [tasks, rows, depth] and [tasks, depth, columns]");
    check(left.scalar_type() == out.scalar_type() && right.scalar_type() == out.scalar_type(), "expected one dtype");
    lefts.push_back(with_plain_rows(left));
  }
  std::optional<Tensor> start = start_;
  if (start) {
    check(start->dim() == 3 && start->size(0) == out.size(0) && (start->size(1) == out.size(1) || start->size(1) == 1) &&
              start->size(2) == out.size(2) && start->scalar_type() == out.scalar_type(),
          "expected a start [tasks, rows or 1, columns]");
    start = with_plain_rows(*start);
  }
  switch (out.scalar_type()) {
    case ScalarType::Float: run(float32::widest_table(), start, lefts, rights, out); break;
    case ScalarType::Double: run(float64::widest_table(), start, lefts, rights, out); break;
    default: check(false, "expected float32 or float64");
  }
  given.give();
}

Tensor sum_of_products(const std::optional<Tensor>& start, const Tensors& lefts, const Tensors& rights) {
  check(!lefts.empty() && !rights.empty() && lefts[0].dim() == 3 && rights[0].dim() == 3, "expected factors [tasks, rows, depth] and [tasks, depth, columns]");
  const Tensor out = torch::stable::new_empty(lefts[0], {lefts[0].size(0), lefts[0].size(1), rights[0].size(2)});
  sum_of_products_out(start, lefts, rights, out);
  return out;
}

}  // namespace
}  // namespace metafast

STABLE_TORCH_LIBRARY_IMPL(metafast, CPU, library) {
  library.impl("sum_of_products", TORCH_BOX(&metafast::sum_of_products));
  library.impl("sum_of_products.out", TORCH_BOX(&metafast::sum_of_products_out));
}
