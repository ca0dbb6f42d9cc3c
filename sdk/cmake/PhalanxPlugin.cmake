# phalanx_add_plugin(KIND ID SOURCES... [LIBS ...] [DIR path]): phx_<kind>_<id>.so with one exported symbol, every
# symbol resolved at link and load time.  Plugins see <phalanx/...> and the kit (LIBS phalanx_kit), nothing else.
#
# Inside Phalanx's tree and, installed as PREFIX/lib*/cmake/phalanx/PhalanxPlugin.cmake, in any project of C:
#   include(/opt/phalanx/lib/cmake/phalanx/PhalanxPlugin.cmake)
#   phalanx_add_plugin(strategy mine SOURCES mine.c LIBS phalanx_kit)
# The plugin is built into lib/phalanx of the build directory; `install` takes it to <prefix>/<libdir>/phalanx.
if(NOT TARGET phalanx_sdk AND EXISTS ${CMAKE_CURRENT_LIST_DIR}/phalanx-targets.cmake)
  include(${CMAKE_CURRENT_LIST_DIR}/phalanx-targets.cmake) # phalanx_sdk, phalanx_kit
endif()
function(phalanx_add_plugin kind id)
  cmake_parse_arguments(P "" "DIR" "SOURCES;LIBS" ${ARGN})
  set(target phx_${kind}_${id})
  set(map ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/plugin.map)
  include(GNUInstallDirs) # CMAKE_INSTALL_LIBDIR is the project's, where it has set one
  add_library(${target} MODULE ${P_SOURCES})
  target_link_libraries(${target} PRIVATE phalanx_sdk ${P_LIBS})
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:C,CXX>:-ffp-contract=off>) # the same bits everywhere
  set_target_properties(${target} PROPERTIES PREFIX "" C_VISIBILITY_PRESET hidden LINK_DEPENDS ${map})
  if(NOT P_DIR)
    set(P_DIR ${CMAKE_BINARY_DIR}/lib/phalanx)
    install(TARGETS ${target} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}/phalanx)
  endif()
  set_target_properties(${target} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${P_DIR})
  target_link_options(${target} PRIVATE -Wl,--version-script=${map} -Wl,-z,now -Wl,-z,nodelete)
  if(NOT PHALANX_SANITIZE)
    target_link_options(${target} PRIVATE -Wl,-z,defs)
  endif()
endfunction()
