# The CUDA part of mmadapt._C, where there is an nvcc. Included by the top CMakeLists.txt.
#
# csrc/cuda/*_sm90.cu use wgmma or TMA and are compiled for sm_90a alone; the others for every entry
# of MMADAPT_CUDA_ARCHS. The runtime is linked statically and the driver not at all, so that the
# module loads on machines without either.

set(MMADAPT_CUDA AUTO CACHE STRING "CUDA kernels: AUTO (where nvcc is found), ON, OFF")
set_property(CACHE MMADAPT_CUDA PROPERTY STRINGS AUTO ON OFF)
set(MMADAPT_CUDA_ARCHS "80-real;90a-real" CACHE STRING
    "Entries as in CMAKE_CUDA_ARCHITECTURES: 80-real (machine code), 90-virtual (PTX), 90 (both)")
option(MMADAPT_WERROR_SPILLS "Treat register spills and stack use of CUDA kernels as errors" OFF)
set(MMADAPT_CUDA_OFF_REASON "MMADAPT_CUDA=OFF" CACHE STRING "What show_config() then says")
set(MMADAPT_NVCC_THREADS 1 CACHE STRING "Architectures that one nvcc compiles at once")

# Sets `out` to the -gencode flags of `archs`, `out_names` to what they give ("sm_80 compute_90").
function(mmadapt_gencode archs out out_names)
  set(flags "")
  set(names "")
  foreach(arch IN LISTS archs)
    if(NOT arch MATCHES "^([0-9]+[af]?)(-real|-virtual)?$")
      message(FATAL_ERROR
              "MMADAPT_CUDA_ARCHS has '${arch}', expected entries such as 80-real;90a-real")
    endif()
    set(number ${CMAKE_MATCH_1})
    set(kind "${CMAKE_MATCH_2}")
    set(codes "")
    if(NOT kind STREQUAL "-virtual")
      list(APPEND codes sm_${number})
    endif()
    if(NOT kind STREQUAL "-real")
      list(APPEND codes compute_${number})
    endif()
    foreach(code IN LISTS codes)
      list(APPEND flags "-gencode=arch=compute_${number},code=${code}")
      list(APPEND names ${code})
    endforeach()
  endforeach()
  list(JOIN names " " names)
  set(${out} "${flags}" PARENT_SCOPE)
  set(${out_names} "${names}" PARENT_SCOPE)
endfunction()

# An object library of CUDA sources whose ptxas reports lie beside the objects (*.ptxas).
function(mmadapt_cuda_objects name gencode)
  add_library(${name} OBJECT ${ARGN})
  target_include_directories(${name} PRIVATE csrc/include csrc/cuda)
  set(host_warnings -Wall,-Wextra)
  if(MMADAPT_WERROR)
    string(APPEND host_warnings ",-Werror")
  endif()
  target_compile_options(${name} PRIVATE
    ${gencode} -lineinfo -Xptxas=-v --threads=${MMADAPT_NVCC_THREADS} --expt-relaxed-constexpr
    -Xcompiler=${host_warnings})
  set(spills report)
  if(MMADAPT_WERROR_SPILLS)
    set(spills error)
  endif()
  set(report ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/ptxas_report.py)
  set_target_properties(${name} PROPERTIES
    CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_ARCHITECTURES OFF CUDA_VISIBILITY_PRESET hidden
    CUDA_COMPILER_LAUNCHER "${Python_EXECUTABLE};${report};${spills}")
  target_sources(_C PRIVATE $<TARGET_OBJECTS:${name}>)
  add_dependencies(cuda_kernels ${name})
endfunction()

# Why there are no CUDA kernels; empty where there are.
set(mmadapt_cuda_absent "")
if(NOT MMADAPT_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "MMADAPT_CUDA is '${MMADAPT_CUDA}', expected AUTO, ON or OFF")
elseif(MMADAPT_CUDA STREQUAL "OFF")
  set(mmadapt_cuda_absent "${MMADAPT_CUDA_OFF_REASON}")
else()
  set(CMAKE_CUDA_ARCHITECTURES OFF)  # ours are per source
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(mmadapt_cuda_absent "no nvcc")
  else()
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.1)  # the first with st.async
      set(mmadapt_cuda_absent "nvcc ${CMAKE_CUDA_COMPILER_VERSION}, needs 12.1")
    endif()
  endif()
  if(mmadapt_cuda_absent AND MMADAPT_CUDA STREQUAL "ON")
    message(FATAL_ERROR "MMADAPT_CUDA=ON: ${mmadapt_cuda_absent}")
  endif()
endif()

if(mmadapt_cuda_absent)
  message(STATUS "mmadapt: no CUDA kernels (${mmadapt_cuda_absent})")
  target_compile_definitions(_C PRIVATE MMADAPT_CUDA_ABSENT="${mmadapt_cuda_absent}")
else()
  find_package(CUDAToolkit REQUIRED)
  add_custom_target(cuda_kernels)  # everything nvcc compiles, without the module
  file(GLOB portable CONFIGURE_DEPENDS csrc/cuda/*.cu)
  file(GLOB hopper CONFIGURE_DEPENDS csrc/cuda/*_sm90.cu)
  list(REMOVE_ITEM portable ${hopper})
  mmadapt_gencode("${MMADAPT_CUDA_ARCHS}" gencode names)
  mmadapt_cuda_objects(cuda_portable "${gencode}" ${portable})

  set(hopper_archs ${MMADAPT_CUDA_ARCHS})
  list(FILTER hopper_archs INCLUDE REGEX "^90a")
  if(hopper AND hopper_archs)
    mmadapt_gencode("${hopper_archs}" gencode hopper_names)
    mmadapt_cuda_objects(cuda_sm90 "${gencode}" ${hopper})
    target_compile_definitions(_C PRIVATE MMADAPT_HAVE_SM90)
  endif()

  target_sources(_C PRIVATE csrc/cuda/bindings.cpp)
  target_include_directories(_C PRIVATE csrc/cuda)
  target_link_libraries(_C PRIVATE CUDA::cudart_static)
  # The runtime's symbols stay inside: torch brings a runtime of its own.
  target_link_options(_C PRIVATE -Wl,--exclude-libs,ALL)
  target_compile_definitions(_C PRIVATE MMADAPT_HAVE_CUDA MMADAPT_CUDA_ARCHS="${names}"
                                        MMADAPT_NVCC_VERSION="${CMAKE_CUDA_COMPILER_VERSION}")
  message(STATUS "mmadapt: CUDA kernels for ${names}, nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
endif()
