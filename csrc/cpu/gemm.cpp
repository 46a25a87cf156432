#include "cpu/gemm.h"

#include <dlfcn.h>

#include <algorithm>

namespace metafast {
namespace {

// The Fortran BLAS interface (32-bit integers): exported by MKL inside libtorch_cpu as by OpenBLAS beside it.
template <typename T>
using BlasGemm = void (*)(const char*, const char*, const int*, const int*, const int*, const T*, const T*, const int*,
                          const T*, const int*, const T*, T*, const int*);

// torch is loaded, with its BLAS among its dependencies, before this extension can be.
void* find_in_torch(const char* name) {
  if (void* torch_cpu = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD)) {
    void* symbol = dlsym(torch_cpu, name);
    dlclose(torch_cpu);
    if (symbol) return symbol;
  }
  return dlsym(RTLD_DEFAULT, name);
}

template <typename T>
BlasGemm<T> blas_gemm();

template <>
BlasGemm<float> blas_gemm<float>() {
  static const auto found = reinterpret_cast<BlasGemm<float>>(find_in_torch("sgemm_"));
  return found;
}

template <>
BlasGemm<double> blas_gemm<double>() {
  static const auto found = reinterpret_cast<BlasGemm<double>>(find_in_torch("dgemm_"));
  return found;
}

// For a torch whose BLAS exports nothing: plain loops, the inner one over contiguous memory where b is not transposed.
template <typename T>
void loop_gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k,
               T alpha, const T* a, int64_t lda, const T* b, int64_t ldb, T beta, T* c, int64_t ldc) {
  for (int64_t i = 0; i < m; ++i) {
    T* row = c + i * ldc;
    if (beta == T(0)) std::fill(row, row + n, T(0));
    else for (int64_t j = 0; j < n; ++j) row[j] *= beta;
    for (int64_t p = 0; p < k; ++p) {
      const T x = alpha * (transpose_a ? a[p * lda + i] : a[i * lda + p]);
      if (transpose_b) for (int64_t j = 0; j < n; ++j) row[j] += x * b[j * ldb + p];
      else for (int64_t j = 0; j < n; ++j) row[j] += x * b[p * ldb + j];
    }
  }
}

template <typename T>
void any_gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k,
              T alpha, const T* a, int64_t lda, const T* b, int64_t ldb, T beta, T* c, int64_t ldc) {
  const BlasGemm<T> blas = blas_gemm<T>();
  if (!blas) return loop_gemm(transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  // Column-major BLAS reads a row-major matrix as its transpose: c^T = op(b)^T op(a)^T. A matrix of one row may carry
  // any distance between rows; BLAS wants at least the length of one.
  const int rows = int(m), columns = int(n), depth = int(k);
  const int a_stride = std::max<int>(int(lda), transpose_a ? rows : depth);
  const int b_stride = std::max<int>(int(ldb), transpose_b ? depth : columns);
  const int c_stride = std::max<int>(int(ldc), columns);
  blas(transpose_b ? "T" : "N", transpose_a ? "T" : "N", &columns, &rows, &depth,
       &alpha, b, &b_stride, a, &a_stride, &beta, c, &c_stride);
}

}  // namespace

void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k,
          float alpha, const float* a, int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  any_gemm(transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k,
          double alpha, const double* a, int64_t lda, const double* b, int64_t ldb, double beta, double* c, int64_t ldc) {
  any_gemm(transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

const char* gemm_library() {
  if (!blas_gemm<float>() || !blas_gemm<double>()) return "built-in loops";
  return find_in_torch("mkl_get_version") || find_in_torch("MKL_Get_Version") ? "MKL of torch" : "BLAS of torch";
}

}  // namespace metafast
