# Finds the pinned llama.cpp (or the one REAP_LLAMA_CPP_SOURCE names) and adds it to the build.
include(${CMAKE_CURRENT_LIST_DIR}/pin.cmake)

set(REAP_LLAMA_CPP_SOURCE "$ENV{REAP_LLAMA_CPP_SOURCE}" CACHE PATH "A checkout of llama.cpp to use instead of the pinned one")
set(REAP_LLAMA_CPP_SDIST "$ENV{REAP_LLAMA_CPP_SDIST}" CACHE FILEPATH "The pinned archive, already downloaded")

if(REAP_LLAMA_CPP_SOURCE)
  set(reap_llama_dir "${REAP_LLAMA_CPP_SOURCE}")
  set(REAP_LLAMA_CPP_COMMIT "own checkout")
  if(NOT EXISTS "${reap_llama_dir}/include/llama.h")
    message(FATAL_ERROR "reap: REAP_LLAMA_CPP_SOURCE=${reap_llama_dir} has no include/llama.h: it is no checkout of llama.cpp")
  endif()
else()
  set(reap_fetch ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/fetch.py --package ${REAP_LLAMA_CPP_PACKAGE}
      --version ${REAP_LLAMA_CPP_VERSION} --sha256 ${REAP_LLAMA_CPP_SHA256})
  if(REAP_LLAMA_CPP_SDIST)
    list(APPEND reap_fetch --sdist ${REAP_LLAMA_CPP_SDIST})
  endif()
  message(STATUS "reap: llama.cpp ${REAP_LLAMA_CPP_COMMIT} from ${REAP_LLAMA_CPP_PACKAGE} ${REAP_LLAMA_CPP_VERSION} (77 MB when it has to be downloaded)")
  execute_process(COMMAND ${reap_fetch} OUTPUT_VARIABLE reap_llama_dir OUTPUT_STRIP_TRAILING_WHITESPACE
                  ERROR_VARIABLE reap_fetch_error RESULT_VARIABLE reap_fetch_result ECHO_ERROR_VARIABLE)
  if(reap_fetch_result)
    message(FATAL_ERROR "${reap_fetch_error}")
  endif()
endif()
set(REAP_LLAMA_CPP_DIR "${reap_llama_dir}")

set(LLAMA_BUILD_COMMON ${REAP_BUILD_LLAMA_TOOLS})
set(LLAMA_BUILD_TOOLS ${REAP_BUILD_LLAMA_TOOLS})
set(LLAMA_BUILD_TESTS ${REAP_BUILD_LLAMA_TOOLS})
foreach(part EXAMPLES SERVER APP UI HTML MTMD)
  set(LLAMA_BUILD_${part} OFF)
endforeach()
set(LLAMA_OPENSSL OFF)
set(LLAMA_CURL OFF)
set(LLAMA_ALL_WARNINGS OFF)
set(GGML_RPC ON CACHE BOOL "ggml: the RPC backend")
if(REAP_PORTABLE)
  # each can still be set by hand. OpenMP is off because libgomp would have to be in the wheel, a second one beside PyTorch's; NCCL, because
  # what happens to be installed where a wheel is built must not become part of it
  foreach(default NATIVE=OFF BACKEND_DL=ON CPU_ALL_VARIANTS=ON OPENMP=OFF CUDA_NCCL=OFF)
    string(REPLACE "=" ";" default GGML_${default})
    list(GET default 0 reap_name)
    list(GET default 1 reap_value)
    if(NOT DEFINED ${reap_name})
      set(${reap_name} ${reap_value})
    endif()
  endforeach()
endif()
set(GGML_CCACHE OFF) # the launcher is set for the whole project

# llama.cpp asks git for a version; in an unpacked tree that would be reap's own
set(LLAMA_BUILD_NUMBER 0)
set(LLAMA_BUILD_COMMIT ${REAP_LLAMA_CPP_COMMIT})

add_subdirectory(${REAP_LLAMA_CPP_DIR} ${CMAKE_BINARY_DIR}/llama.cpp EXCLUDE_FROM_ALL)

# The backends: libraries that ggml links, or, with GGML_BACKEND_DL, modules that it loads at run time (ggml-cpu then in one variant for
# each kind of processor, where GGML_CPU_ALL_VARIANTS is on).
get_property(reap_backends DIRECTORY ${REAP_LLAMA_CPP_DIR}/ggml/src PROPERTY BUILDSYSTEM_TARGETS)
foreach(folder rpc blas cuda hip musa metal vulkan sycl opencl cann webgpu zdnn openvino hexagon virtgpu zendnn)
  if(TARGET ggml-${folder})
    list(APPEND reap_backends ggml-${folder})
  endif()
endforeach()
list(FILTER reap_backends EXCLUDE REGEX "^(ggml|ggml-base)$|-feats$")
set(reap_cpu_backends ${reap_backends})
list(FILTER reap_cpu_backends INCLUDE REGEX "^ggml-cpu")

# An assertion that fails becomes an exception (csrc/assertion_guard.cpp), which has to pass through ggml's C code.
foreach(library ggml-base ${reap_cpu_backends})
  target_compile_options(${library} PRIVATE $<$<COMPILE_LANGUAGE:C>:-fexceptions>)
endforeach()

# GCC's _tile_loadconfig tells the optimiser that it reads 8 bytes of a 64-byte configuration, so the stores behind the first 8 are
# deleted as dead and the first AMX tile instruction faults. Keep those stores; the compile commands are checked by tests/test_build.py.
# The variants share one directory, but a source property belongs to a directory: naming one target of it serves them all.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  list(GET reap_cpu_backends 0 reap_cpu_target)
  set_source_files_properties(${REAP_LLAMA_CPP_DIR}/ggml/src/ggml-cpu/amx/mmq.cpp TARGET_DIRECTORY ${reap_cpu_target}
                              PROPERTIES COMPILE_OPTIONS "-fno-tree-dse;-fno-dse")
endif()

# Where NVIDIA's PyPI packages put their libraries, seen from the folder of ours.
if(TARGET ggml-cuda)
  find_package(CUDAToolkit REQUIRED) # for its version
  if(CUDAToolkit_VERSION_MAJOR GREATER_EQUAL 13)
    set(reap_cuda_folders cu${CUDAToolkit_VERSION_MAJOR}/lib)
  else()
    set(reap_cuda_folders cublas/lib cuda_runtime/lib)
  endif()
  list(TRANSFORM reap_cuda_folders PREPEND $ORIGIN/../nvidia/)
  set_property(TARGET ggml-cuda PROPERTY INSTALL_RPATH $ORIGIN ${reap_cuda_folders})
endif()

if(TARGET ggml-vulkan)
  find_package(Vulkan REQUIRED) # for its version
  if(Vulkan_VERSION VERSION_LESS 1.3.272)
    target_compile_options(ggml-vulkan PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:SHELL:-include ${CMAKE_CURRENT_LIST_DIR}/vulkan_layer_settings.h>")
  endif()
endif()
