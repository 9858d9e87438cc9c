// The Fortran routines of LAPACK that dense.cpp calls, from the OpenMP build of OpenBLAS with 32-bit integers.
// All matrices are column-major there: a row-major array read as column-major is its transpose. gfortran passes the
// length of each character argument as a hidden size_t after the others.
#pragma once

#include <cstddef>

extern "C" {
void dpotrf_(const char* uplo, const int* n, double* a, const int* lda, int* info, size_t);
void dpotri_(const char* uplo, const int* n, double* a, const int* lda, int* info, size_t);
void dsyev_(const char* jobz, const char* uplo, const int* n, double* a, const int* lda, double* w, double* work, const int* lwork,
            int* info, size_t, size_t);
void dsytrd_(const char* uplo, const int* n, double* a, const int* lda, double* d, double* e, double* tau, double* work,
             const int* lwork, int* info, size_t);
void dstemr_(const char* jobz, const char* range, const int* n, double* d, double* e, const double* vl, const double* vu,
             const int* il, const int* iu, int* m, double* w, double* z, const int* ldz, const int* nzc, int* isuppz, int* tryrac,
             double* work, const int* lwork, int* iwork, const int* liwork, int* info, size_t, size_t);
void dormtr_(const char* side, const char* uplo, const char* trans, const int* m, const int* n, const double* a, const int* lda,
             const double* tau, double* c, const int* ldc, double* work, const int* lwork, int* info, size_t, size_t, size_t);
}
