// Package labrun runs lists of tests: the lab batch of `make test`, and the long
// proofs of `make prove`.
//
//	                                    .--> worker: a lab, or this machine --.
//	jobs ---> go test -c (outside) ---> |                                     +--> Report
//	                                    '--> worker: another lab -------------'
//
// A job is one test, one proof or one fuzz target. Every line of its output is
// searched for skips, counts and figures; it is printed when the job fails.
//
// The list of packages with tests for the lab is [LabPackages]; the list of
// proofs is [Proofs]. In the lab nothing may skip, and a target that runs no
// test fails: a list that has rotted must be noticed.
package labrun
