// Renders openapi.json as a page. All content is inserted as text.
"use strict";

function make(tag, text, attributes = {}, ...children) {
  const node = document.createElement(tag);
  if (text !== null) node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function table(caption, header, rows) {
  const head = make("tr", null, {}, ...header.map((cell) => make("th", cell, { scope: "col" })));
  const body = rows.map(([first, ...rest]) =>
    make("tr", null, {}, make("th", first, { scope: "row" }), ...rest.map((cell) => make("td", cell))),
  );
  return make(
    "table",
    null,
    {},
    make("caption", caption),
    make("thead", null, {}, head),
    make("tbody", null, {}, ...body),
  );
}

function type(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(type).filter((one) => one !== "null").join(" or ");
  if (schema.enum) return schema.enum.join(" or ");
  if (schema.type === "array") return `list of ${type(schema.items)}`;
  if (schema.additionalProperties) return `${type(schema.additionalProperties)} by name`;
  return schema.type ?? "any";
}

function fallback(schema) {
  return schema.default === undefined ? "" : JSON.stringify(schema.default);
}

function operation(path, method, about) {
  const part = make("section", null, {}, make("h2", `${method.toUpperCase()} ${path}`));
  part.append(make("p", about.summary ?? ""));
  const parameters = (about.parameters ?? []).map(({ name, required, schema, description }) => [
    name,
    type(schema),
    required ? "required" : fallback(schema),
    description ?? schema.description ?? "",
  ]);
  if (parameters.length) {
    part.append(table("Parameters", ["name", "type", "default", "meaning"], parameters));
  }
  const body = about.requestBody?.content["application/json"].schema;
  if (body) part.append(make("p", `The body is JSON: ${type(body)}.`));
  const answers = Object.entries(about.responses).map(([status, { description, content = {} }]) => [
    status,
    description,
    Object.entries(content).map(([kind, { schema }]) => (schema ? type(schema) : kind)).join(", "),
  ]);
  part.append(table("Responses", ["status", "when", "content"], answers));
  return part;
}

function shape(name, { description = "", properties = {} }) {
  const rows = Object.entries(properties).map(([key, schema]) => [
    key,
    type(schema),
    schema.description ?? "",
  ]);
  return make(
    "section",
    null,
    {},
    make("h2", name),
    make("p", description),
    table("Fields", ["name", "type", "meaning"], rows),
  );
}

async function start() {
  const api = await (await fetch("openapi.json")).json();
  const place = document.getElementById("operations");
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, about] of Object.entries(methods)) place.append(operation(path, method, about));
  }
  for (const [name, schema] of Object.entries(api.components.schemas)) place.append(shape(name, schema));
}

start();
