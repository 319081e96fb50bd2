// The package of the end-to-end tests; everything is in its test file.
package e2e
