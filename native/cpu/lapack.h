// The Fortran routines of LAPACK that dense.cpp calls, from the OpenMP build of OpenBLAS with 32-bit integers.
// All matrices are column-major there: a row-major array read as column-major is its transpose. gfortran passes the
// length of each character argument as a hidden size_t after the others.
#pragma once

#include <cstddef>

extern "C" {
void dpotrf_(const char* uplo, const int* n, double* a, const int* lda, int* info, size_t);
void dpotri_(const char* uplo, const int* n, double* a, const int* lda, int* info, size_t);
void dsytrd_(const char* uplo, const int* n, double* a, const int* lda, double* d, double* e, double* tau, double* work,
             const int* lwork, int* info, size_t);
void dstebz_(const char* range, const char* order, const int* n, const double* vl, const double* vu, const int* il, const int* iu,
             const double* abstol, const double* d, const double* e, int* m, int* nsplit, double* w, int* iblock, int* isplit,
             double* work, int* iwork, int* info, size_t, size_t);
void dstein_(const int* n, const double* d, const double* e, const int* m, const double* w, const int* iblock, const int* isplit,
             double* z, const int* ldz, double* work, int* iwork, int* ifail, int* info);
void dormtr_(const char* side, const char* uplo, const char* trans, const int* m, const int* n, const double* a, const int* lda,
             const double* tau, double* c, const int* ldc, double* work, const int* lwork, int* info, size_t, size_t, size_t);
}
