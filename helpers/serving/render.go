// Renders conversations with a Modelfile's TEMPLATE, in the engine that Ollama uses.
// Standard input: {"Template": …, "Talks": […]}; standard output: a list of texts.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Talk struct {
	System   string
	Messages []struct{ Role, Content string }
}

type Job struct {
	Template string
	Talks    []Talk
}

func main() {
	var job Job
	check(json.NewDecoder(os.Stdin).Decode(&job))
	engine, err := template.New("").Option("missingkey=zero").Parse(job.Template)
	check(err)
	texts := make([]string, len(job.Talks))
	for i, talk := range job.Talks {
		var out strings.Builder
		check(engine.Execute(&out, talk))
		texts[i] = out.String()
	}
	check(json.NewEncoder(os.Stdout).Encode(texts))
}

func check(err error) {
	if err != nil {
		os.Stderr.WriteString(err.Error())
		os.Exit(1)
	}
}
