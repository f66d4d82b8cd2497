// Package config says what a virtual machine is made of: one [Config], the
// same whether it came from flags or from a YAML file.
//
//	defaults  <  file (YAML, strict)  <  flags
//	                 |
//	             Validate          pure: looks at no file and no device
//	                 |
//	            vmm.New(cfg)       opens what the configuration names
//
// A list given by flags (disks, nets) replaces the list of the file. Paths in
// a file are relative to the file's folder, paths in flags to the working
// directory.
//
// Every complaint is one line that names the field, the value and the cure
// ([Error]).
package config
