# `cmake --install`: headers, the library, and what find_package(deeppcr) reads.
include(CMakePackageConfigHelpers)
set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/deeppcr")
install(TARGETS deeppcr deeppcr_compiling EXPORT deeppcr-targets)
install(DIRECTORY include/deeppcr DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(EXPORT deeppcr-targets NAMESPACE deeppcr:: DESTINATION "${package_dir}")
configure_package_config_file(cmake/deeppcr-config.cmake.in "${CMAKE_CURRENT_BINARY_DIR}/deeppcr-config.cmake"
                              INSTALL_DESTINATION "${package_dir}")
write_basic_package_version_file("${CMAKE_CURRENT_BINARY_DIR}/deeppcr-config-version.cmake"
                                 COMPATIBILITY SameMinorVersion)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/deeppcr-config.cmake"
              "${CMAKE_CURRENT_BINARY_DIR}/deeppcr-config-version.cmake" cmake/FindHighway.cmake
        DESTINATION "${package_dir}")
