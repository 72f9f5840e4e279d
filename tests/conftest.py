"""Its being here puts this folder on the import path: `import small`, `import cases` from any test."""
