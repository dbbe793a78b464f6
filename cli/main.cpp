// The program deeppcr.
#include "command.hpp"

int main(int argc, char** argv) {
    using namespace deeppcr::program;
    Program program;
    add_reproduce(program);
    program.add_group("train", "Train a network");
    add_train(program);
    add_train_diffusion(program);
    add_train_language_model(program);
    add_train_swap(program);
    add_train_task(program);
    add_prepare(program);
    add_plan(program);
    add_validate(program);
    add_generate(program);
    add_sample(program);
    add_evaluate(program);
    add_analyse(program);
    add_solve(program);
    add_check(program);
    add_info(program);
    return program.run(argc, argv);
}
