// The versions of the stand-ins: those of the headers they were compiled with.
#include <cublas_v2.h>
#include <cusolverDn.h>

namespace {

int propertyOf(libraryPropertyType type, int major, int minor, int patch) {
  const int values[] = {major, minor, patch};
  return values[type];
}

}  // namespace

cublasStatus_t cublasGetProperty(libraryPropertyType type, int* value) {
  *value = propertyOf(type, CUBLAS_VER_MAJOR, CUBLAS_VER_MINOR, CUBLAS_VER_PATCH);
  return CUBLAS_STATUS_SUCCESS;
}

cusolverStatus_t cusolverGetProperty(libraryPropertyType type, int* value) {
  *value = propertyOf(type, CUSOLVER_VER_MAJOR, CUSOLVER_VER_MINOR, CUSOLVER_VER_PATCH);
  return CUSOLVER_STATUS_SUCCESS;
}
