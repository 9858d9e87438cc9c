# The CUDA device on the simulator, as a shared object like the real one, and the native tests on it. LORA_DA_CUDA_LIBRARY names it.
# Its cuBLAS and cuSOLVER are OpenBLAS, which a build without the CPU device has not looked for.
find_library(OPENBLAS_LIBRARY openblas PATH_SUFFIXES openblas-openmp REQUIRED)
get_filename_component(OPENBLAS_FOLDER ${OPENBLAS_LIBRARY} DIRECTORY)
file(GLOB SIMULATED_LIBRARIES CONFIGURE_DEPENDS ${CUDA_SIM_FOLDER}/*_shim.cpp)
add_library(lora_da_cuda_sim SHARED)
add_simulated_cuda(lora_da_cuda_sim ${CUDA_SOURCES} ${SIMULATED_LIBRARIES})
target_link_libraries(lora_da_cuda_sim PRIVATE ${OPENBLAS_LIBRARY})
target_link_options(lora_da_cuda_sim PRIVATE -Wl,-z,defs)
set_target_properties(lora_da_cuda_sim PROPERTIES BUILD_RPATH "${OPENBLAS_FOLDER}")
add_test(NAME native_cuda_sim COMMAND native_tests)
# Between the stand-ins' products kernels run on one thread for long: the others are not to spin meanwhile.
set(environment LORA_DA_TEST_DEVICES=cuda LORA_DA_TEST_SMALL=1 LORA_DA_CUDA_LIBRARY=$<TARGET_FILE:lora_da_cuda_sim>
    OMP_WAIT_POLICY=passive)
if(CUDA_MAJORS)
  list(GET CUDA_MAJORS 0 major)
  list(APPEND environment CUDA_SIM_REGISTERS=${CMAKE_BINARY_DIR}/cuda${major}/registers.txt)
endif()
set_tests_properties(native_cuda_sim PROPERTIES ENVIRONMENT "${environment}")
