// Package labrun runs lists of tests: the lab batch of `make test`, and the long
// proofs of `make prove`.
//
//	targets ---> go test -c (outside) ---> one lab, or this machine ---> Report
//	                                          |
//	                                   every line of output: passed on, and
//	                                   searched for skips, counts and figures
//
// The list of packages with tests for the lab is [LabPackages]; the list of
// proofs is [Proofs]. In the lab nothing may skip, and a target that runs no
// test fails: a list that has rotted must be noticed.
package labrun
