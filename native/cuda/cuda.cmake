# The CUDA device: for each toolkit that is found (CUDA 12, 13) a shared object that the core opens at run time,
# liblora_da_cuda12.so and liblora_da_cuda13.so. nvcc is called directly, since one build tree of CMake knows only one CUDA compiler.
# Sets CUDA_HEADERS, for the simulator, where a toolkit is found.

set(LORA_DA_CUDA AUTO CACHE STRING "Build the CUDA device: AUTO where a toolkit is found, ON or OFF")
set_property(CACHE LORA_DA_CUDA PROPERTY STRINGS AUTO ON OFF)
set(LORA_DA_CUDA_ARCHITECTURES "" CACHE STRING
    "GPUs that machine code is made for, as in 80;90, where the compiler knows them; empty: 80;86;89;90;100;120")
set(CUDA_FOLDER ${CMAKE_CURRENT_LIST_DIR})

# What crosses the boundary between core and shared object (core/device_plugin.h): both carry the hash of its headers.
set(PLUGIN_HEADERS device.h device_plugin.h dtype.h error.h)
set(PLUGIN_ABI "")
foreach(header ${PLUGIN_HEADERS})
  set(header ${CMAKE_CURRENT_SOURCE_DIR}/native/core/${header})
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${header})
  file(SHA256 ${header} hash)
  string(APPEND PLUGIN_ABI ${hash})
endforeach()
string(SHA256 PLUGIN_ABI "${PLUGIN_ABI}")
set_source_files_properties(native/core/cuda_library.cpp ${CUDA_FOLDER}/plugin.cpp
                            PROPERTIES COMPILE_DEFINITIONS LORA_DA_PLUGIN_ABI="${PLUGIN_ABI}")
target_link_libraries(lora_da_core PUBLIC ${CMAKE_DL_LIBS})

# Folders that may hold a toolkit: the first of each major version counts. Of those installed the newest come first.
find_program(CUDA_NVCC_IN_PATH nvcc NO_CACHE)
set(CUDA_COMPILERS ${CMAKE_CUDA_COMPILER} $ENV{CUDA_HOME}/bin/nvcc $ENV{CUDA_PATH}/bin/nvcc ${CUDA_NVCC_IN_PATH})
file(GLOB CUDA_INSTALLED LIST_DIRECTORIES true /usr/local/cuda/bin/nvcc /usr/local/cuda-*/bin/nvcc /opt/cuda/bin/nvcc
     ${CMAKE_CURRENT_SOURCE_DIR}/.cuda/*/bin/nvcc)
list(SORT CUDA_INSTALLED COMPARE NATURAL ORDER DESCENDING)
list(APPEND CUDA_COMPILERS ${CUDA_INSTALLED})

# The parts of a toolkit that are needed, as TOOLKIT_*; TOOLKIT_PROBLEM says what is wrong with it.
macro(examine_toolkit nvcc)
  set(TOOLKIT_PROBLEM "")
  set(TOOLKIT_NVCC ${nvcc})
  get_filename_component(TOOLKIT_ROOT ${nvcc} REALPATH)
  get_filename_component(TOOLKIT_ROOT ${TOOLKIT_ROOT} DIRECTORY)
  get_filename_component(TOOLKIT_ROOT ${TOOLKIT_ROOT} DIRECTORY)
  execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE TOOLKIT_VERSION ERROR_QUIET)
  string(REGEX MATCH "release ([0-9]+)\\.[0-9]+" TOOLKIT_VERSION "${TOOLKIT_VERSION}")
  set(TOOLKIT_MAJOR ${CMAKE_MATCH_1})
  if(NOT TOOLKIT_VERSION)
    set(TOOLKIT_PROBLEM "it does not run")
  elseif(TOOLKIT_MAJOR LESS 12)
    set(TOOLKIT_PROBLEM "CUDA 12 or later is needed, this is ${TOOLKIT_VERSION}")
  endif()
  foreach(part cublas_v2.h cusolverDn.h cuda_runtime.h)
    unset(TOOLKIT_HEADERS)
    find_path(TOOLKIT_HEADERS ${part} HINTS ${TOOLKIT_ROOT}/include ${TOOLKIT_ROOT}/targets/x86_64-linux/include NO_CACHE)
    if(NOT TOOLKIT_HEADERS AND NOT TOOLKIT_PROBLEM)
      set(TOOLKIT_PROBLEM "${part} is missing")
    endif()
  endforeach()
  set(TOOLKIT_LIBRARIES "")
  foreach(part cudart_static cublas cublasLt cusolver)
    unset(TOOLKIT_LIBRARY)
    find_library(TOOLKIT_LIBRARY ${part} HINTS ${TOOLKIT_ROOT}/lib64 ${TOOLKIT_ROOT}/lib NO_CACHE)
    if(TOOLKIT_LIBRARY)
      list(APPEND TOOLKIT_LIBRARIES ${TOOLKIT_LIBRARY})
    elseif(NOT TOOLKIT_PROBLEM)
      set(TOOLKIT_PROBLEM "lib${part} is missing")
    endif()
  endforeach()
endmacro()

# Whether nvcc gets along with this host compiler; each release of it takes compilers up to some version.
function(try_toolkit)
  set(probe ${CMAKE_BINARY_DIR}/cuda${TOOLKIT_MAJOR}/probe)
  set(key "${TOOLKIT_NVCC} ${TOOLKIT_VERSION} ${CMAKE_CXX_COMPILER} ${CMAKE_CXX_COMPILER_VERSION}")
  if("${CUDA_PROBED_${TOOLKIT_MAJOR}}" STREQUAL "${key}")
    return()
  endif()
  file(WRITE ${probe}.cu "#include <cuda_bf16.h>\n#include <functional>\n__global__ void probe(float* x) { *x = 1; }\n")
  execute_process(COMMAND ${TOOLKIT_NVCC} -ccbin ${CMAKE_CXX_COMPILER} -std=c++17 -arch=sm_80 -c ${probe}.cu -o ${probe}.o
                  RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(result EQUAL 0)
    set(CUDA_PROBED_${TOOLKIT_MAJOR} ${key} CACHE INTERNAL "the toolkit and host compiler that compiled a kernel together")
  else()
    string(STRIP "${output}" output)
    set(TOOLKIT_PROBLEM "it does not compile with ${CMAKE_CXX_COMPILER}: ${output}" PARENT_SCOPE)
  endif()
endfunction()

# Sets TOOLKIT_ARCHITECTURES: those asked for that the compiler knows.
macro(choose_architectures)
  execute_process(COMMAND ${TOOLKIT_NVCC} --list-gpu-arch OUTPUT_VARIABLE TOOLKIT_KNOWN)
  set(TOOLKIT_ASKED ${LORA_DA_CUDA_ARCHITECTURES})
  if(NOT TOOLKIT_ASKED)
    set(TOOLKIT_ASKED 80 86 89 90 100 120)
  endif()
  set(TOOLKIT_ARCHITECTURES "")
  foreach(architecture ${TOOLKIT_ASKED})
    if("${TOOLKIT_KNOWN}\n" MATCHES "compute_${architecture}\n")
      list(APPEND TOOLKIT_ARCHITECTURES ${architecture})
    endif()
  endforeach()
  if(NOT TOOLKIT_ARCHITECTURES)
    set(TOOLKIT_PROBLEM "${TOOLKIT_VERSION} compiles for none of ${TOOLKIT_ASKED}")
  endif()
endmacro()

# The flags of nvcc for machine code of each architecture, and for the last also PTX, which later GPUs compile for themselves.
function(architecture_flags result)
  foreach(architecture ${TOOLKIT_ARCHITECTURES})
    list(APPEND flags -gencode=arch=compute_${architecture},code=sm_${architecture})
  endforeach()
  list(GET TOOLKIT_ARCHITECTURES -1 newest)
  list(APPEND flags -gencode=arch=compute_${newest},code=compute_${newest})
  set(${result} ${flags} PARENT_SCOPE)
endfunction()

# The shared object of the toolkit at hand. What ptxas says of each kernel goes to cudaN/*.log, and from there, as a table, to
# cudaN/resources.txt and cudaN/registers.txt.
function(add_cuda_device)
  set(folder ${CMAKE_BINARY_DIR}/cuda${TOOLKIT_MAJOR})
  architecture_flags(architectures)
  set(flags -ccbin ${CMAKE_CXX_COMPILER} -std=c++17 -O3 -Xptxas=-v -x=cu -I${CMAKE_CURRENT_SOURCE_DIR}/native
            -DLORA_DA_PLUGIN_ABI="${PLUGIN_ABI}" -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-unused-parameter)
  foreach(source ${CUDA_SOURCES})
    get_filename_component(name ${source} NAME_WE)
    set(object ${folder}/${name}.o)
    set(log ${folder}/${name}.log)
    set(target_flags ${architectures})
    if(source MATCHES "\\.cpp$")  # host code only: one architecture does
      set(target_flags -arch=sm_80)
    endif()
    add_custom_command(
      OUTPUT ${object} ${log}
      COMMAND ${CMAKE_COMMAND} -P ${CUDA_FOLDER}/logged.cmake ${log} ${TOOLKIT_NVCC} ${flags} ${target_flags} -MMD -MF ${object}.d -MT ${object}
              -c ${source} -o ${object}
      DEPENDS ${source} ${CUDA_FOLDER}/logged.cmake
      DEPFILE ${object}.d
      COMMENT "nvcc ${TOOLKIT_MAJOR}: ${name}"
      VERBATIM)
    list(APPEND objects ${object})
    list(APPEND logs ${log})
  endforeach()
  set_source_files_properties(${objects} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)

  set(target lora_da_cuda${TOOLKIT_MAJOR})
  add_library(${target} SHARED ${objects})
  set_target_properties(${target} PROPERTIES LINKER_LANGUAGE CXX)
  target_link_libraries(${target} PRIVATE ${TOOLKIT_LIBRARIES} Threads::Threads ${CMAKE_DL_LIBS} rt)
  # A member that no file defines shows here, not when the object is opened.
  target_link_options(${target} PRIVATE -Wl,-z,defs -Wl,--exclude-libs,ALL)

  add_custom_command(
    OUTPUT ${folder}/resources.txt ${folder}/registers.txt
    COMMAND ${CMAKE_COMMAND} -P ${CUDA_FOLDER}/resources.cmake ${folder} ${logs}
    DEPENDS ${logs} ${CUDA_FOLDER}/resources.cmake
    VERBATIM)
  add_custom_target(${target}_resources ALL DEPENDS ${folder}/resources.txt)
  # After the library, whose commands make the logs: side by side, make would run those commands in both.
  add_dependencies(${target}_resources ${target})
  if(LORA_DA_TESTS)
    add_test(NAME cuda${TOOLKIT_MAJOR}_no_spills COMMAND ${CMAKE_COMMAND} -P ${CUDA_FOLDER}/no_spills.cmake ${folder}/resources.txt)
  endif()
  message(STATUS "CUDA device: ${target} by ${TOOLKIT_NVCC} for ${TOOLKIT_ARCHITECTURES}")
endfunction()

file(GLOB CUDA_SOURCES CONFIGURE_DEPENDS ${CUDA_FOLDER}/*.cu ${CUDA_FOLDER}/*.cpp)
foreach(shared lowest_eigenpairs symmetric_eigenpairs)  # every device's
  list(APPEND CUDA_SOURCES ${CMAKE_CURRENT_SOURCE_DIR}/native/core/${shared}.cpp)
endforeach()
set(CUDA_PROBLEMS "")
set(CUDA_MAJORS "")
foreach(nvcc ${CUDA_COMPILERS})
  if(NOT EXISTS ${nvcc})
    continue()
  endif()
  examine_toolkit(${nvcc})
  if(NOT TOOLKIT_PROBLEM AND NOT TOOLKIT_MAJOR IN_LIST CUDA_MAJORS)
    if(NOT CUDA_HEADERS)
      set(CUDA_HEADERS ${TOOLKIT_HEADERS})
    endif()
    if(LORA_DA_CUDA)
      choose_architectures()
    endif()
    if(LORA_DA_CUDA AND NOT TOOLKIT_PROBLEM)
      try_toolkit()
    endif()
    if(LORA_DA_CUDA AND NOT TOOLKIT_PROBLEM)
      list(APPEND CUDA_MAJORS ${TOOLKIT_MAJOR})
      add_cuda_device()
    endif()
  endif()
  if(TOOLKIT_PROBLEM)
    string(APPEND CUDA_PROBLEMS "\n  ${nvcc}: ${TOOLKIT_PROBLEM}")
  endif()
endforeach()
set(CUDA_TOOLKITS ${CUDA_MAJORS} CACHE INTERNAL "major versions of the CUDA toolkits that compile the device")
if(CUDA_PROBLEMS)
  message(STATUS "CUDA toolkits that are passed over:${CUDA_PROBLEMS}")
endif()
if(LORA_DA_CUDA STREQUAL "ON" AND NOT CUDA_MAJORS)
  message(FATAL_ERROR "LORA_DA_CUDA is ON, but no CUDA toolkit 12 or later was found: set CUDA_HOME, or run scripts/cuda-toolkit.sh")
endif()
