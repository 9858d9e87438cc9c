# The simulator as a library, add_simulated_cuda for the targets that use it, and its own tests.

# Compiles the .cu files among the sources of `target` as C++ and links the simulator. Each is included by a .cpp file of its own,
# since a source's language holds for all targets, nvcc's too. Kernels are optimized in every build, since the simulator runs each
# of their threads. Symbols are exported so that a program and a shared object it opens share one simulator.
function(add_simulated_cuda target)
  foreach(source ${ARGN})
    if(source MATCHES "\\.cu$")
      get_filename_component(path ${source} ABSOLUTE)
      file(RELATIVE_PATH name ${CMAKE_SOURCE_DIR} ${path})
      set(source ${CMAKE_CURRENT_BINARY_DIR}/cuda_sim/${target}/${name}.cpp)
      file(GENERATE OUTPUT ${source} CONTENT "#include \"${path}\"\n")
    endif()
    target_sources(${target} PRIVATE ${source})
  endforeach()
  target_compile_options(${target} PRIVATE -O2 -g -Wno-unknown-pragmas)
  target_link_libraries(${target} PRIVATE cuda_sim)
  set_target_properties(${target} PROPERTIES ENABLE_EXPORTS ON)
endfunction()

set(CUDA_SIM_FOLDER ${CMAKE_CURRENT_LIST_DIR})
add_library(cuda_sim STATIC ${CUDA_SIM_FOLDER}/device.cpp ${CUDA_SIM_FOLDER}/fiber.cpp ${CUDA_SIM_FOLDER}/graphs.cpp
            ${CUDA_SIM_FOLDER}/launch.cpp ${CUDA_SIM_FOLDER}/memory.cpp ${CUDA_SIM_FOLDER}/simt.cpp
            ${CUDA_SIM_FOLDER}/streams.cpp ${CUDA_SIM_FOLDER}/symbols.cpp ${CUDA_SIM_FOLDER}/tensor_core.cpp)
target_include_directories(cuda_sim PUBLIC native ${CUDA_SIM_FOLDER})
target_include_directories(cuda_sim SYSTEM PUBLIC ${CUDA_HEADERS})
target_compile_options(cuda_sim PRIVATE -O2 -g)
target_link_libraries(cuda_sim PUBLIC ${CMAKE_DL_LIBS})

add_executable(cuda_sim_tests native/test/main.cpp)
target_include_directories(cuda_sim_tests SYSTEM PRIVATE ${THIRD_PARTY})
file(GLOB CUDA_SIM_TEST_SOURCES CONFIGURE_DEPENDS ${CUDA_SIM_FOLDER}/*_test.cpp ${CUDA_SIM_FOLDER}/*.cu
     ${CUDA_SIM_FOLDER}/*_shim.cpp)
add_simulated_cuda(cuda_sim_tests ${CUDA_SIM_TEST_SOURCES})
target_link_libraries(cuda_sim_tests PRIVATE ${OPENBLAS_LIBRARY})
set_target_properties(cuda_sim_tests PROPERTIES BUILD_RPATH "${OPENBLAS_FOLDER}")
add_test(NAME cuda_sim COMMAND cuda_sim_tests)
