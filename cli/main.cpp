// The program deeppcr.
#include "command.hpp"

int main(int argc, char** argv) {
    using namespace deeppcr::program;
    Program program;
    add_reproduce(program);
    add_train(program);
    add_validate(program);
    add_analyse(program);
    add_solve(program);
    add_check(program);
    add_info(program);
    return program.run(argc, argv);
}
