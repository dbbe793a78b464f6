# `cmake --install`: the core's headers and library, and what find_package(deeppcr) reads. cli/ installs the program.
# nn/ is not part of the installed package: it would tie every user of the core to one version of LibTorch.
include(CMakePackageConfigHelpers)
set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/deeppcr")
install(TARGETS deeppcr EXPORT deeppcr-targets)
install(DIRECTORY include/deeppcr DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}" PATTERN nn EXCLUDE)
install(EXPORT deeppcr-targets NAMESPACE deeppcr:: DESTINATION "${package_dir}")
configure_package_config_file(cmake/deeppcr-config.cmake.in "${CMAKE_CURRENT_BINARY_DIR}/deeppcr-config.cmake"
                              INSTALL_DESTINATION "${package_dir}")
write_basic_package_version_file("${CMAKE_CURRENT_BINARY_DIR}/deeppcr-config-version.cmake"
                                 COMPATIBILITY SameMinorVersion)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/deeppcr-config.cmake"
              "${CMAKE_CURRENT_BINARY_DIR}/deeppcr-config-version.cmake" cmake/FindHighway.cmake
        DESTINATION "${package_dir}")
