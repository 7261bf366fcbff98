# Faults planted in a copy of csrc, each behind a number of its own, so that one build serves for all of them.

# The sources that faults may go into, relative to csrc.
macro(read_sources)
  set(planted_files ${ARGN})
  set(fault_count 0)
  foreach(file ${planted_files})
    file(READ ${CMAKE_SOURCE_DIR}/csrc/${file} "text_of_${file}")
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/${file})
  endforeach()
endmacro()

# Replaces a text that is there once.
function(plant file old new)
  set(text "${text_of_${file}}")
  string(FIND "${text}" "${old}" first)
  string(FIND "${text}" "${old}" last REVERSE)
  if(first EQUAL -1 OR NOT first EQUAL last)
    message(FATAL_ERROR "faults.cmake: '${old}' is not there once in csrc/${file}; say where the fault goes now")
  endif()
  string(REPLACE "${old}" "${new}" text "${text}")
  set("text_of_${file}" "${text}" PARENT_SCOPE)
endfunction()

# `new` says FAULT where the fault is in.
macro(plant_fault file old new)
  math(EXPR fault_count "${fault_count} + 1")
  string(REPLACE "FAULT" "planted(${fault_count})" replacement "${new}")
  plant(${file} "${old}" "${replacement}")
endmacro()

# Writes what has changed since last time.
function(write_planted tree)
  foreach(file ${planted_files})
    set(before)
    if(EXISTS ${tree}/${file})
      file(READ ${tree}/${file} before)
    endif()
    if(NOT "${text_of_${file}}" STREQUAL "${before}")
      file(WRITE ${tree}/${file} "${text_of_${file}}")
    endif()
  endforeach()
endfunction()
