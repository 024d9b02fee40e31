-- Puts the messages of a withdrawn batch back into the outbox, under their ids and uids. Under the relay's lock only:
-- whoever takes over looks at them after that. Primary keys.
-- $1 id
with gone as (
    delete from shardmq.outbox_batch b where b.id = $1 and b.state = 'withdrawn'
       and current_setting('shardmq.relay', true) = 'true'
    returning b.topic, b.ids, b.uids, b.keys, b.headers, b.payloads
)
insert into shardmq.outbox (id, uid, topic, key, headers, payload, published_at)
select m.id, m.uid, g.topic, m.key, m.headers, m.payload, shardmq.clock()
  from gone g, unnest(g.ids, g.uids, g.keys, g.headers, g.payloads) m (id, uid, key, headers, payload)
