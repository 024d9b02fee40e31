-- Sets messages aside that no partition takes. Under the relay's lock only. Primary keys.
-- $1 ids of the outbox  $2 ids of those for later  $3 all these ids  $4 the error of each
with gone as (
    delete from shardmq.outbox o
     where o.id = any($1::bigint[]) and current_setting('shardmq.relay', true) = 'true'
    returning o.id, o.uid, o.topic, o.key, o.headers, o.payload
), due as (
    delete from shardmq.delayed d
     where d.id = any($2::bigint[]) and current_setting('shardmq.relay', true) = 'true'
    returning d.id, d.uid, d.topic, d.key, d.headers, d.payload
)
insert into shardmq.outbox_dead as x (id, uid, topic, key, headers, payload, error, died_at)
select m.id, m.uid, m.topic, m.key, m.headers, m.payload,
       e.error, shardmq.clock()
  from (select * from gone union all select * from due) m
  join unnest($3::bigint[], $4::text[]) e (id, error) on e.id = m.id
on conflict (id) do nothing
returning x.id, x.topic, x.error
