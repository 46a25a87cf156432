// Matrix products on one thread, by the BLAS that torch itself carries.
#pragma once

#include <cstdint>

namespace metafast {

// c = alpha * op(a) op(b) + beta * c, row-major; op(a) is m x k, op(b) is k x n, op transposes where told to.
// lda, ldb and ldc are the distances between rows of a, b and c as they are stored. beta == 0 never reads c.
void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k,
          float alpha, const float* a, int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc);
void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k,
          double alpha, const double* a, int64_t lda, const double* b, int64_t ldb, double beta, double* c, int64_t ldc);

// Where the products come from: the name of a library, for build_info().
const char* gemm_library();

}  // namespace metafast
