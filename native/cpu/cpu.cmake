# The CPU device, added to lora_da_core. Sets OPENBLAS_FOLDER, where programs find the library at run time.

# oneDNN multiplies matrices, OpenBLAS (its OpenMP build, so that there is one thread pool) does LAPACK.
find_package(OpenMP REQUIRED)
find_path(DNNL_INCLUDE dnnl.hpp)
find_library(DNNL_LIBRARY dnnl)
find_library(OPENBLAS_LIBRARY openblas PATH_SUFFIXES openblas-openmp)
if(NOT DNNL_INCLUDE OR NOT DNNL_LIBRARY OR NOT OPENBLAS_LIBRARY)
  message(FATAL_ERROR "the CPU device needs oneDNN and OpenBLAS: apt-get install libdnnl-dev libopenblas-openmp-dev"
                      " (or configure with -DLORA_DA_CPU=OFF for a build with a CUDA device only)")
endif()
get_filename_component(OPENBLAS_FOLDER ${OPENBLAS_LIBRARY} DIRECTORY)

# The kernels, once per instruction set; native/cpu/kernels/dispatch.cpp chooses at run time.
set(KERNEL_SOURCES native/cpu/kernels/elementwise_kernels.cpp native/cpu/kernels/attention_forward.cpp
    native/cpu/kernels/attention_backward.cpp native/cpu/kernels/attention_cached.cpp
    native/cpu/kernels/panel_kernels.cpp
    native/cpu/kernels/product_kernels.cpp native/cpu/kernels/moment_kernels.cpp
    native/cpu/kernels/softmax_kernels.cpp native/cpu/kernels/table.cpp)
set(KERNEL_FLAGS -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast -fopenmp-simd)
if(LORA_DA_SANITIZE)
  list(APPEND KERNEL_FLAGS -O1)  # instrumented, tiles in registers take the compiler minutes a file from -O2 on
endif()
function(add_kernels isa)
  add_library(kernels_${isa} OBJECT ${KERNEL_SOURCES})
  target_include_directories(kernels_${isa} PRIVATE native)
  target_compile_definitions(kernels_${isa} PRIVATE KERNEL_ISA=${isa})
  target_compile_options(kernels_${isa} PRIVATE ${KERNEL_FLAGS} ${ARGN})
  target_sources(lora_da_core PRIVATE $<TARGET_OBJECTS:kernels_${isa}>)
endfunction()
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  add_kernels(baseline)
  add_kernels(avx2 -march=x86-64-v3)
  add_kernels(avx512 -march=x86-64-v4 -mprefer-vector-width=512)
  add_kernels(avx512bf16 -march=x86-64-v4 -mavx512bf16 -mprefer-vector-width=512)
else()
  add_kernels(baseline)
endif()

file(GLOB CPU_SOURCES CONFIGURE_DEPENDS native/cpu/*.cpp native/cpu/kernels/dispatch.cpp)
target_sources(lora_da_core PRIVATE ${CPU_SOURCES})
target_include_directories(lora_da_core PUBLIC ${DNNL_INCLUDE})
target_link_libraries(lora_da_core PUBLIC ${DNNL_LIBRARY} ${OPENBLAS_LIBRARY} OpenMP::OpenMP_CXX)
