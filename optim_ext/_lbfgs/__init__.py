"""The step of L-BFGS: torch's control flow (step.py) around one object of C++ that holds state and history."""
