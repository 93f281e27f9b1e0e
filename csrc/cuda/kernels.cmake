# flashmaps_add_cuda_kernels(module language): a module of the CUDA kernels, compiled by nvcc for
# language CUDA or for the host, by the emulation, for CXX. One object for each type of tokens and
# size of pieces, so that they compile side by side.
set(FLASHMAPS_CUDA_FOLDER ${CMAKE_CURRENT_LIST_DIR})

# The unit for exponentials bounds passes over heads of up to 64 numbers; multiplications could take
# some of them. No card has told yet whether that pays.
set(FLASHMAPS_POLYNOMIAL 0 CACHE STRING "Eighths of the exponentials that are polynomials")

function(flashmaps_add_cuda_kernels module language)
  set(folder ${FLASHMAPS_CUDA_FOLDER})
  if(language STREQUAL CXX)
    set(as_cxx -x c++)  # .cu is a name that the compiler does not know
    set(not_installed EXCLUDE_FROM_ALL)
  endif()
  set_source_files_properties(${folder}/launch.cu ${folder}/variant.cu
    PROPERTIES LANGUAGE ${language})
  add_library(${module}_options INTERFACE)
  target_include_directories(${module}_options INTERFACE ${folder}/..)
  target_compile_definitions(${module}_options
    INTERFACE FLASHMAPS_POLYNOMIAL=${FLASHMAPS_POLYNOMIAL})
  target_compile_options(${module}_options INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall> $<$<COMPILE_LANGUAGE:CXX>:-Wextra>)

  pybind11_add_module(${module} MODULE NO_EXTRAS ${not_installed} ${folder}/bindings.cpp)
  target_link_libraries(${module} PRIVATE ${module}_options)
  target_compile_definitions(${module} PRIVATE FLASHMAPS_MODULE=${module})
  # Hundreds of little functions that run once: optimising them takes longer than all else.
  set_source_files_properties(${folder}/bindings.cpp PROPERTIES COMPILE_OPTIONS -O1)

  add_library(${module}_launch STATIC ${not_installed} ${folder}/launch.cu)
  set(objects ${module}_launch)
  foreach(token Half BFloat)
    foreach(steps 3 4 5)
      set(variant ${module}_${token}_${steps})
      add_library(${variant} STATIC ${not_installed} ${folder}/variant.cu)
      target_compile_definitions(${variant}
        PRIVATE FLASHMAPS_TOKEN=${token} FLASHMAPS_STEPS=${steps})
      list(APPEND objects ${variant})
    endforeach()
  endforeach()
  foreach(object ${objects})
    target_link_libraries(${object} PRIVATE ${module}_options)
    target_compile_options(${object} PRIVATE ${as_cxx})
  endforeach()
  target_link_libraries(${module} PRIVATE ${objects})
endfunction()
