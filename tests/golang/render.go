// Reads a Modelfile and conversations as JSON from stdin, and writes the prompts that Ollama's engine makes of them.
//
// What Ollama does around text/template is written down again here: how a Modelfile's quoted value is read (characters that
// do not print are lost, but for line breaks), how a conversation is collated, and what a template is given.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

// templateOf finds the TEMPLATE of a Modelfile: its value ends at the first line that completes the three quotes.
func templateOf(modelfile string) (string, error) {
	_, rest, found := strings.Cut("\n"+modelfile, "\nTEMPLATE ")
	if !found {
		return "", fmt.Errorf("no TEMPLATE")
	}
	var read strings.Builder
	for _, r := range rest {
		if r == '\n' {
			value := strings.TrimSpace(read.String())
			if len(value) >= 6 && strings.HasPrefix(value, `"""`) && strings.HasSuffix(value, `"""`) {
				return value[3 : len(value)-3], nil
			}
			read.WriteRune(r)
		} else if strconv.IsPrint(r) {
			read.WriteRune(r)
		}
	}
	return "", fmt.Errorf("the TEMPLATE does not end")
}

// collate joins neighbours of one role and gathers the system prompts.
func collate(given []message) (string, []message) {
	var systems []string
	var joined []message
	for _, m := range given {
		if m.Role == "system" {
			systems = append(systems, m.Content)
		}
		if last := len(joined) - 1; last >= 0 && joined[last].Role == m.Role {
			joined[last].Content += "\n\n" + m.Content
		} else {
			joined = append(joined, m)
		}
	}
	return strings.Join(systems, "\n\n"), joined
}

func run() error {
	var asked struct {
		Modelfile     string
		Conversations [][]message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		return err
	}
	text, err := templateOf(asked.Modelfile)
	if err != nil {
		return err
	}
	parsed, err := template.New("").Option("missingkey=zero").Parse(text)
	if err != nil {
		return err
	}
	prompts := []string{}
	for _, conversation := range asked.Conversations {
		system, messages := collate(conversation)
		var prompt strings.Builder
		if err := parsed.Execute(&prompt, map[string]any{"System": system, "Messages": messages, "Response": ""}); err != nil {
			return err
		}
		prompts = append(prompts, prompt.String())
	}
	return json.NewEncoder(os.Stdout).Encode(prompts)
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
