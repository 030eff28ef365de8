// An extension of JupyterLab, loaded as it stands: it needs no build.
// JupyterLab draws a PNG output without its text alternative. Here the `alt` of the output's metadata is set.
(() => {
  const PICTURE = "image/png";

  // Return a renderer's factory that sets the text alternative of each picture it draws.
  function describe(factory) {
    const createRenderer = (options) => {
      const renderer = factory.createRenderer(options);
      const renderModel = renderer.renderModel.bind(renderer);
      renderer.renderModel = async (model) => {
        await renderModel(model);
        const picture = renderer.node.querySelector("img");
        const words = (model.metadata[PICTURE] || {}).alt;
        if (picture && words) {
          picture.alt = words;
        }
      };
      return renderer;
    };
    return { safe: factory.safe, mimeTypes: [PICTURE], defaultRank: factory.defaultRank, createRenderer };
  }

  // Return the module of this name that JupyterLab shares with its extensions.
  async function sharedModule(scope, name) {
    const [version] = Object.values(scope[name]);
    return (await version.get())();
  }

  let scope;
  const container = {
    init(shared) {
      scope = shared;
    },
    async get() {
      const { IRenderMimeRegistry } = await sharedModule(scope, "@jupyterlab/rendermime");
      const plugin = {
        id: "figure-descriptions:plugin",
        autoStart: true,
        requires: [IRenderMimeRegistry],
        activate: (app, registry) => registry.addFactory(describe(registry.getFactory(PICTURE))),
      };
      return () => ({ __esModule: true, default: plugin });
    },
  };
  window._JUPYTERLAB = window._JUPYTERLAB || {};
  window._JUPYTERLAB["figure-descriptions"] = container;
})();
