# stub_plugin(GROUP KIND ID SOURCE DEFINITIONS...): build/lib/phalanx-test/GROUP/phx_KIND_ID.so from one source, with a
# target name of its own, so that it may bear the name of a real plugin.
function(stub_plugin group kind id source)
  set(target test_${group}_${kind}_${id})
  add_library(${target} MODULE ${source})
  target_link_libraries(${target} PRIVATE phalanx_sdk)
  target_include_directories(${target} PRIVATE ${CMAKE_SOURCE_DIR}/tests/plugins)
  target_compile_definitions(${target} PRIVATE STUB_ID="${id}" ${ARGN})
  target_link_options(${target} PRIVATE -Wl,--version-script=${CMAKE_SOURCE_DIR}/sdk/cmake/plugin.map -Wl,-z,now)
  set_target_properties(${target} PROPERTIES PREFIX "" OUTPUT_NAME phx_${kind}_${id}
                        LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/lib/phalanx-test/${group})
endfunction()
