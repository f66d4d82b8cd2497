package kernel

// Available returns those of names that the kernel has as modules, in their
// order, leaving out what is built in and what it does not have at all. A
// kernel without a modules folder has none.
func (k Kernel) Available(names ...string) ([]string, error) {
	if k.ModulesDir == "" {
		return nil, nil
	}
	set, err := openModules(k.ModulesDir)
	if err != nil {
		return nil, err
	}
	var have []string
	for _, name := range names {
		n := moduleName(name)
		if !set.builtin[n] && set.paths[n] != "" {
			have = append(have, n)
		}
	}
	return have, nil
}
